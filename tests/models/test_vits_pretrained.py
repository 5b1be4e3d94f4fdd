"""Vits.load_pretrained: the authors' files, Hugging Face's model, and what is said when something does not fit."""

import itertools
from unittest import mock

import pytest
import torch
from test_vits import SEVERAL, batch_of, mask, tiny
from torch.distributions import Normal, SigmoidTransform

from models import vits


def hugging_face(use_sdp: bool, speakers: int, seed: int = 0):
    """A small random VitsModel of transformers, of the shapes of tiny(), without noise."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.VitsModel(
        transformers.VitsConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=2,
            ffn_dim=32,
            flow_size=8,
            spectrogram_bins=33,
            use_stochastic_duration_prediction=use_sdp,
            num_speakers=speakers,
            speaker_embedding_size=6 if speakers > 1 else 0,
            upsample_initial_channel=16,
            upsample_rates=[4, 4],
            upsample_kernel_sizes=[8, 8],
            resblock_kernel_sizes=[3, 5],
            resblock_dilation_sizes=[[1, 3], [1, 2]],
            duration_predictor_filter_channels=12,
            prior_encoder_num_flows=2,
            prior_encoder_num_wavenet_layers=2,
            posterior_encoder_num_wavenet_layers=3,
            noise_scale=0.0,
            noise_scale_duration=0.0,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("translate", "log_scale")):
                parameter.add_(0.1 * torch.randn_like(parameter))  # zeros and ones would hide a mix-up
            if name.startswith("decoder.conv_post"):
                parameter.mul_(0.1)  # tanh must not saturate
    return model.eval()


def loaded(model, use_sdp: bool, speakers: int):
    own = vits.Vits(tiny(use_sdp=use_sdp, **({"num_speakers": speakers, "gin_channels": 6} if speakers > 1 else {})))
    own.load_pretrained(model.state_dict())
    return own.eval()


@pytest.mark.parametrize(("use_sdp", "speakers"), list(itertools.product((True, False), (1, 3))))
def test_hugging_faces_model_gives_the_same_waveform(use_sdp, speakers):
    theirs = hugging_face(use_sdp, speakers)
    own = loaded(theirs, use_sdp, speakers)
    tokens = torch.randint(0, 20, (1, 11), generator=torch.Generator().manual_seed(1))
    for speaker in range(speakers):
        with torch.no_grad():
            expected = theirs(tokens, **({"speaker_id": speaker} if speakers > 1 else {}))
        found = own.inference(tokens, speaker_ids=torch.tensor([speaker]), noise_scale=0.0, noise_scale_w=0.0)
        # fp32 through some forty layers
        torch.testing.assert_close(found["waveform"], expected.waveform, atol=2e-5, rtol=0)
        assert torch.equal(found["lengths"], expected.sequence_lengths)
        assert 0.01 < float(found["waveform"].std()) < 0.9


@pytest.mark.parametrize("speakers", [1, 3])
def test_hugging_faces_training_parts_give_the_same(speakers):
    """The posterior, the flow forwards and the bound of the durations, which no inference runs."""
    theirs = hugging_face(True, speakers)
    own = loaded(theirs, True, speakers)
    g = torch.randn(2, 6, 1) if speakers > 1 else None
    linear, is_in = torch.rand(2, 33, 12), mask(2, 12)
    noise = torch.randn(2, 8, 12)
    with torch.no_grad(), mock.patch("torch.randn_like", return_value=noise):
        found = own.enc_q(linear, is_in, g)
        expected = theirs.posterior_encoder(linear, is_in, g)
        z_p, z_p_expected = own.flow(found[0], is_in, g), theirs.flow(found[0], is_in, g)
    for a, b in zip((*found, z_p), (*expected, z_p_expected)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    x, durations, noise = torch.randn(2, 16, 12), torch.randint(1, 6, (2, 1, 12)) * is_in, torch.randn(2, 2, 12)
    with torch.no_grad(), mock.patch("torch.randn_like", return_value=noise):
        found = own.dp(x, is_in, durations, g)
        expected = duration_bound(theirs.duration_predictor, x, is_in, g, durations, noise)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


def duration_bound(dp, x, is_in, g, durations, noise) -> torch.Tensor:
    """The bound of section 2.2.2, [B], with transformers' layers and torch's distributions.

    Not with their forward: it exchanges the channels once more than the authors, and than its own reverse.
    """
    normal, sigmoid = Normal(0.0, 1.0), SigmoidTransform()
    h = dp.conv_pre(x) + (0 if g is None else dp.cond(g))
    h = dp.conv_proj(dp.conv_dds(h, is_in)) * is_in
    d = dp.post_conv_proj(dp.post_conv_dds(dp.post_conv_pre(durations), is_in)) * is_in

    def run(flows, z, condition):
        z, log_dets = flows[0](z, is_in)
        for flow in flows[1:]:
            z, log_det = flow(z, is_in, global_conditioning=condition)
            z, log_dets = z.flip(1), log_dets + log_det
        return z, log_dets

    z, log_dets = run(dp.post_flows, noise * is_in, h + d)
    u = sigmoid(z[:, :1])
    log_q = (normal.log_prob(noise) * is_in).sum((1, 2)) - log_dets
    log_q = log_q - (sigmoid.log_abs_det_jacobian(z[:, :1], u) * is_in).sum((1, 2))
    logarithm = torch.log(torch.where(is_in > 0, durations - u, 1).clamp_min(1e-5))
    z, log_dets = run(dp.flows, torch.cat([logarithm, z[:, 1:]], dim=1), h)
    log_p = (normal.log_prob(z) * is_in).sum((1, 2)) + log_dets - logarithm.sum((1, 2))
    return log_q - log_p


def authors_files(model: vits.Vits) -> tuple[dict, dict]:
    """What the authors' training would save of this model: G_0.pth and D_0.pth."""
    generator, discriminator = {}, {}
    for name, weight in model.state_dict().items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        part = discriminator if name.startswith("disc.") else generator
        part[name.removeprefix("disc.")] = weight.clone()
    return tuple(
        {"model": part, "iteration": 3, "optimizer": {"state": {}}, "learning_rate": 2e-4}
        for part in (generator, discriminator)
    )


def test_the_authors_files_are_loaded_one_by_one(tmp_path):
    source, own = vits.Vits(tiny(**SEVERAL)), vits.Vits(tiny(**SEVERAL))
    generator, discriminator = authors_files(source)
    # names that the authors' files have, written down from their code
    assert {"enc_p.encoder.attn_layers.0.emb_rel_k", "dec.ups.0.weight_g", "dec.resblocks.3.convs2.1.weight_v"} <= set(
        generator["model"]
    )
    assert {"dp.post_flows.7.convs.norms_2.2.gamma", "dp.flows.0.logs", "flow.flows.2.enc.cond_layer.weight_v"} <= set(
        generator["model"]
    )
    assert {"enc_q.enc.res_skip_layers.2.bias", "emb_g.weight", "dp.cond.weight"} <= set(generator["model"])
    assert {"discriminators.0.convs.0.weight_g", "discriminators.2.conv_post.bias"} <= set(discriminator["model"])
    torch.save(generator, tmp_path / "G_0.pth")
    torch.save(discriminator, tmp_path / "D_0.pth")
    disc_before = {name: w.clone() for name, w in own.state_dict().items() if name.startswith("disc.")}
    own.load_pretrained(tmp_path / "G_0.pth")
    assert all(torch.equal(own.state_dict()[name], w) for name, w in disc_before.items())
    own.load_pretrained(str(tmp_path / "D_0.pth"))
    assert all(torch.equal(w, source.state_dict()[name]) for name, w in own.state_dict().items())


def test_safetensors_and_own_checkpoints_are_loaded(tmp_path):
    from safetensors.torch import save_file

    source = vits.Vits(tiny())
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.save({"model": {f"module.{name}": w for name, w in source.state_dict().items()}}, tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        own = vits.Vits(tiny())
        own.load_pretrained(tmp_path / name)
        assert all(torch.equal(w, source.state_dict()[key]) for key, w in own.state_dict().items())


def test_weights_without_weight_norm_keep_their_values():
    source, own = vits.Vits(tiny()), vits.Vits(tiny())
    plain = {}
    for name, weight in source.state_dict().items():
        if name.endswith("original0"):
            stem = name.removesuffix(".parametrizations.weight.original0")
            plain[f"{stem}.weight"] = source.get_submodule(stem).weight.detach()
        elif not name.endswith("original1"):
            plain[name] = weight
    own.load_pretrained(plain)
    batch = source.format_batch_on_device(batch_of(source.config, 2, 5))
    outputs = []
    for model in (source, own):
        torch.manual_seed(0)
        outputs.append(model.eval()(batch))
    for name in outputs[0]:
        torch.testing.assert_close(outputs[0][name], outputs[1][name], atol=1e-4, rtol=1e-4)


def test_every_problem_is_listed_with_the_config_field_and_nothing_is_loaded():
    own = vits.Vits(tiny())
    before = {name: w.clone() for name, w in own.state_dict().items()}
    state = vits.Vits(tiny(num_symbols=21)).state_dict()
    del state["dp.proj.bias"]
    state["enc_p.encoder.attn_layers.2.conv_q.bias"] = torch.zeros(16)
    state["global_step"] = torch.zeros(1)
    with pytest.raises(ValueError, match="4 weights do not fit this model") as error:
        own.load_pretrained(state)
    lines = str(error.value).splitlines()[1:]
    assert sorted(lines) == [
        "  dp.proj.bias: missing, [16] here (use_sdp, hidden_channels, dp_filter_channels)",
        "  enc_p.emb.weight: [21, 16] there, [20, 16] here (num_symbols, hidden_channels)",
        "  enc_p.encoder.attn_layers.2.conv_q.bias: unexpected, [16] there (n_layers, hidden_channels)",
        "  global_step: unexpected, [1] there (no config field decides about it)",
    ]
    assert all(torch.equal(w, before[name]) for name, w in own.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"use_sdp": False}, "use_sdp"),
        (SEVERAL, "gin_channels"),
        ({"n_layers": 3}, "n_layers"),
        ({"posterior_layers": 4}, "posterior_layers"),
        ({"n_flows": 3}, "n_flows"),
        ({"filter_channels": 48}, "filter_channels"),
        ({"window_size": 2}, "window_size"),
        ({"resblock": "2"}, "resblock"),
        ({"upsample_initial_channel": 32}, "upsample_initial_channel"),
        ({"disc_periods": [2, 3, 5]}, "disc_periods"),
        ({"disc_scale_channels": [4, 8, 8]}, "disc_scale_channels"),
        ({"filter_length": 128}, "filter_length"),
    ],
)
def test_the_message_names_the_field_that_differs(changes, field):
    state = vits.Vits(tiny(**{"segment_size": 256, **changes})).state_dict()
    with pytest.raises(ValueError, match="not fit this model") as error:
        vits.Vits(tiny()).load_pretrained(state)
    assert field in str(error.value)


def test_an_empty_checkpoint_is_refused():
    with pytest.raises(ValueError, match="holds no weights"):
        vits.Vits(tiny()).load_pretrained({})


def test_files_that_would_run_code_are_refused(tmp_path):
    torch.save({"model": tiny}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth: holds more than tensors.*could execute code"):
        vits.Vits(tiny()).load_pretrained(tmp_path / "code.pth")
