"""Vits as a whole: its steps, inference, what it shows, its data, its config, mixed precision, and that it learns."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from test_vits import SEVERAL, batch_of, steady_noise, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from models import vits
from models.vits import SMALL, Vits, VitsConfig
from trainer.data.ljspeech import read_ljspeech
from trainer.data.speech import DataError, SpeechSample
from trainer.testing import moved, overfit_one_batch


def model_and_batch(B: int = 3, T: int = 8, **changes) -> tuple[Vits, dict]:
    torch.manual_seed(0)
    config = tiny(**changes)
    model = moved(Vits(config), seed=0, by=0.02)
    return model, model.format_batch_on_device(batch_of(config, B, T))


def parameters_of(model: Vits) -> list[list]:
    """The discriminator's and the generator's, as the Trainer knows them: from the optimizers."""
    return [[p for group in o.param_groups for p in group["params"]] for o in model.get_optimizer()]


# ---- training steps ----


def test_steps_return_their_losses_and_outputs():
    model, batch = model_and_batch()
    outputs, losses = model.train_step(batch, None, 0)
    assert outputs == {}
    assert list(losses) == ["loss", "loss_disc", "loss_disc_real", "loss_disc_generated"]
    outputs, generator = model.train_step(batch, None, 1)
    assert list(generator) == ["loss", "loss_gen", "loss_feat", "loss_mel", "loss_dur", "loss_kl"]
    assert losses.keys() & generator.keys() == {"loss"}
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "generated": (3, 1, 128),
        "real": (3, 1, 128),
        "mel_real": (3, 10, 8),
        "alignment": (3, 24, 8),
        "mel_generated": (3, 10, 8),
    }
    for found in (losses, generator):
        assert all(value.shape == () and torch.isfinite(value) for value in found.values())
        assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    parts = sum(value for name, value in generator.items() if name != "loss")
    torch.testing.assert_close(generator["loss"].detach(), parts)


def test_generator_runs_once_for_both_steps_and_leaves_nothing_behind():
    model, batch = model_and_batch()
    runs = []
    model.dec.register_forward_hook(lambda *_: runs.append(1))
    keys = set(batch)
    attributes = set(vars(model))
    model.train_step(batch, None, 0)
    model.train_step(batch, None, 1)
    assert len(runs) == 1
    assert set(batch) == keys
    assert set(vars(model)) == attributes
    model.train_step(batch, None, 0)
    model.train_step(batch, None, 0)
    assert len(runs) == 3  # a new step never takes an old pass
    model.train_step({**batch}, None, 1)
    model.train_step({name: value for name, value in batch.items() if name in keys}, None, 1)
    assert len(runs) == 4  # without a discriminator's pass it runs by itself


def test_losses_are_those_of_the_paper():
    """All losses again, from the outputs and the parts, one clip and one discriminator at a time."""
    model, batch = model_and_batch(c_mel=45.0)
    model.eval()
    _, disc = model.train_step(batch, None, 0)
    outputs, gen = model.train_step(batch, None, 1)
    real, generated = outputs["real"], outputs["generated"]
    expected = dict.fromkeys(("real", "generated", "gen", "feat"), 0.0)
    with torch.no_grad():
        for judge in model.disc.discriminators:
            (score_r, features_r), (score_g, features_g) = judge(real), judge(generated)
            expected["real"] += ((score_r - 1) ** 2).mean()
            expected["generated"] += (score_g**2).mean()
            expected["gen"] += ((score_g - 1) ** 2).mean()
            expected["feat"] += 2 * sum(F.l1_loss(a, b) for a, b in zip(features_r, features_g))
    for name, key in (("real", "loss_disc_real"), ("generated", "loss_disc_generated")):
        torch.testing.assert_close(disc[key], expected[name])
    torch.testing.assert_close(disc["loss_disc"], expected["real"] + expected["generated"])
    torch.testing.assert_close(gen["loss_gen"], expected["gen"])
    torch.testing.assert_close(gen["loss_feat"], expected["feat"])
    torch.testing.assert_close(gen["loss_mel"], 45 * (outputs["mel_real"] - outputs["mel_generated"]).abs().mean())


def test_segments_of_waveform_and_spectrogram_are_the_same_piece():
    model, batch = model_and_batch(B=4)
    outputs, _ = model.train_step(batch, None, 1)
    mel = vits.log_mel(batch["linear"], model.mel_filters)
    for i in range(4):
        starts = [s for s in range(mel.size(2) - 7) if torch.equal(mel[i, :, s : s + 8], outputs["mel_real"][i])]
        assert len(starts) == 1
        assert torch.equal(batch["waveform"][i, 16 * starts[0] :][:128], outputs["real"][i, 0])
        assert starts[0] + 8 <= int(batch["wave_lengths"][i]) // 16


@pytest.mark.parametrize("use_sdp", [True, False])
def test_duration_loss_is_per_token(use_sdp):
    model, batch = model_and_batch(use_sdp=use_sdp, p_dropout=0.0, dp_dropout=0.0)
    tokens = batch["token_lengths"]
    with steady_noise(), torch.no_grad():
        passed = model(batch)
        mask = vits.sequence_mask(tokens, 8)
        x, _, _ = model.enc_p(batch["tokens"], mask)
        durations = passed["alignment"].sum(1, keepdim=True)
        if use_sdp:
            expected = model.dp(x, mask, durations).sum() / tokens.sum()
        else:
            expected = sum(
                (model.dp(x, mask)[i, 0, :n] - torch.log(durations[i, 0, :n] + 1e-6)).square().sum()
                for i, n in enumerate(tokens.tolist())
            ) / sum(tokens.tolist())
    torch.testing.assert_close(passed["loss_dur"], expected)
    assert torch.equal(durations.sum((1, 2)), batch["spec_lengths"].float())


def test_durations_teach_the_predictor_only():
    model, batch = model_and_batch(**SEVERAL)
    gradients = torch.autograd.grad(model(batch)["loss_dur"], parameters_of(model)[1], allow_unused=True)
    names = [name for name, _ in model.named_parameters() if not name.startswith("disc.")]
    reached = {name.split(".")[0] for name, g in zip(names, gradients) if g is not None and g.abs().max() > 0}
    assert reached == {"dp"}


def test_each_optimizer_gets_the_gradients_of_its_own_parameters():
    model, batch = model_and_batch()
    disc, gen = parameters_of(model)
    assert {id(p) for p in disc} == {id(p) for p in model.disc.parameters()}
    assert {id(p) for p in disc + gen} == {id(p) for p in model.parameters()}
    assert len(disc) + len(gen) == len(list(model.parameters()))
    loss = model.train_step(batch, None, 0)[1]["loss"]
    assert all(g is None for g in torch.autograd.grad(loss, gen, retain_graph=True, allow_unused=True))
    loss.backward(inputs=disc)
    assert all(p.grad is not None for p in disc)
    assert all(p.grad is None for p in gen)
    before = [p.grad.clone() for p in disc]
    model.train_step(batch, None, 1)[1]["loss"].backward(inputs=gen)
    assert all(p.grad is not None for p in gen)
    assert all(torch.equal(p.grad, g) for p, g in zip(disc, before))


def test_accumulated_micro_batches_keep_their_own_pass():
    """All discriminator passes, its step, then all generator passes: as if each micro-batch had been alone."""
    gradients = {}
    for together in (True, False):
        model, first = model_and_batch(B=2)
        second = model.format_batch_on_device(batch_of(model.config, 3, 6))
        gen = parameters_of(model)[1]
        torch.manual_seed(1)
        if together:
            for batch in (first, second):
                model.train_step(batch, None, 0)
            for batch in (first, second):
                model.train_step(batch, None, 1)[1]["loss"].backward(inputs=gen)
        else:
            for batch in (first, second):
                model.train_step(batch, None, 0)
                model.train_step(batch, None, 1)[1]["loss"].backward(inputs=gen)
        gradients[together] = [p.grad for p in gen]
    assert all(torch.equal(a, b) for a, b in zip(gradients[True], gradients[False]))


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read from the device, or a shape depends on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_to_copy.device", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.WAITS):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("use_sdp", [True, False])
def test_steps_do_not_wait_for_the_device(use_sdp):
    model, batch = model_and_batch(use_sdp=use_sdp, **SEVERAL)
    raw = batch_of(model.config, 3, 8)
    with NoWaiting():
        batch = model.format_batch_on_device(raw)
        for i, parameters in enumerate(parameters_of(model)):
            model.train_step(batch, None, i)[1]["loss"].backward(inputs=parameters)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        batch["tokens"].max().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_do_not_wait_for_a_gpu():
    model, _ = model_and_batch()
    model.cuda()
    raw = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch_of(model.config, 3, 8).items()}
    parameters = parameters_of(model)
    for mode in ("default", "error"):  # the first round may set up libraries
        torch.cuda.set_sync_debug_mode(mode)
        try:
            batch = model.format_batch_on_device(dict(raw))
            for i in (0, 1):
                model.train_step(batch, None, i)[1]["loss"].backward(inputs=parameters[i])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p.grad).all() for group in parameters for p in group if p.grad is not None)
    assert any(p.grad is not None for p in parameters[0])


def test_eval_steps_under_inference_mode():
    model, batch = model_and_batch()
    model.eval()
    with torch.inference_mode():
        torch.manual_seed(0)
        both = [model.eval_step(batch, None, i)[1] for i in (0, 1)]
        torch.manual_seed(0)
        alone = model.eval_step(batch, None, 1)[1]
    assert all(torch.isfinite(value) for losses in both for value in losses.values())
    for name, value in alone.items():
        torch.testing.assert_close(value, both[1][name])


def test_optimizers_and_schedulers_are_the_papers():
    model, _ = model_and_batch()
    optimizers = model.get_optimizer()
    schedulers = model.get_scheduler(optimizers)
    for optimizer, scheduler in zip(optimizers, schedulers):
        assert type(optimizer) is torch.optim.AdamW
        options = {name: optimizer.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        assert options == {"lr": 2e-4, "betas": (0.8, 0.99), "eps": 1e-9, "weight_decay": 0.01}
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [pytest.approx(2e-4 * 0.999875, rel=1e-12)]
    model.config.lr = [1e-4, 3e-4]
    assert [o.param_groups[0]["lr"] for o in model.get_optimizer()] == [1e-4, 3e-4]
    assert model.get_criterion() is None


# ---- learning and precision ----


def train(model: Vits, batch: dict, steps: int, lr: float, autocast=None, scaler=None) -> list[dict[str, float]]:
    """Plain GAN training on one batch, as the Trainer does it."""
    model.config.lr = lr
    optimizers, losses = model.get_optimizer(), []
    parameters = parameters_of(model)
    for _ in range(steps):
        losses.append({})
        for i, optimizer in enumerate(optimizers):
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                _, found = model.train_step(batch, None, i)
            loss = found["loss"] if scaler is None else scaler.scale(found["loss"])
            loss.backward(inputs=parameters[i])
            optimizer.step() if scaler is None else scaler.step(optimizer)
            optimizer.zero_grad()
            losses[-1].update({name: float(value.detach()) for name, value in found.items() if name != "loss"})
        if scaler is not None:
            scaler.update()
    return losses


def test_training_on_one_batch_learns():
    model, batch = model_and_batch(B=2, p_dropout=0.0, dp_dropout=0.0)
    losses = train(model, batch, steps=120, lr=2e-3)
    for name, share in (("loss_mel", 0.6), ("loss_kl", 0.6), ("loss_dur", 0.97)):
        first, last = (sum(entry[name] for entry in part) / 10 for part in (losses[:10], losses[-10:]))
        assert last < share * first, f"{name} went from {first:.3f} to {last:.3f}"


def test_discriminator_tells_one_batch_apart():
    model, batch = model_and_batch(B=2)
    with torch.no_grad():
        passed = {name: value.detach() for name, value in model(batch).items()}
    losses = overfit_one_batch(
        lambda: model._discriminator_step(passed)[1]["loss"], model.disc.parameters(), below=0.3, lr=5e-3
    )
    assert losses[0] > 1.5


def test_durations_are_learnt_and_spoken():
    """What the deterministic predictor learns from an alignment is what inference then takes."""
    model, batch = model_and_batch(B=1, use_sdp=False, dp_dropout=0.0, p_dropout=0.0)
    wanted = torch.tensor([[[3.0, 1, 2, 5, 1, 4, 2, 6]]])
    mask = torch.ones(1, 1, 8)
    x, _, _ = model.enc_p(batch["tokens"], mask)
    # durations are rounded up: half a frame less is learnt
    loss = lambda: (model.dp(x, mask) - torch.log(wanted - 0.5)).square().mean()  # noqa: E731
    overfit_one_batch(loss, model.dp.parameters(), below=1e-4, steps=600)
    assert model.eval().inference(batch["tokens"])["durations"].tolist() == [[3, 1, 2, 5, 1, 4, 2, 6]]


# CPUs emulate fp16 slowly: as few channels and layers as there can be
THIN = {
    "hidden_channels": 4,
    "inter_channels": 4,
    "filter_channels": 4,
    "dp_filter_channels": 4,
    "posterior_layers": 1,
    "n_layers": 1,
    "n_flows": 1,
    "upsample_initial_channel": 8,
    "disc_periods": [2],
    "disc_scale_channels": [2, 4, 4],
}


@pytest.mark.parametrize(("dtype", "use_sdp"), [("bfloat16", True), ("bfloat16", False), ("float16", True)])
def test_mixed_precision_stays_finite(dtype, use_sdp):
    model, batch = model_and_batch(B=2, T=4, use_sdp=use_sdp, **SEVERAL, **THIN)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if dtype == "float16" else None
    losses = train(model, batch, steps=20, lr=5e-3, autocast=getattr(torch, dtype), scaler=scaler)
    assert all(math.isfinite(value) for entry in losses for value in entry.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1]["loss_mel"] < losses[0]["loss_mel"]
    if scaler is not None:
        assert scaler.get_scale() >= 2.0**5  # halved at most 5 times while the scale is found


def test_losses_under_autocast_are_close_to_those_in_fp32():
    model, batch = model_and_batch(B=2, p_dropout=0.0, dp_dropout=0.0)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append([model.train_step(batch, None, i)[1] for i in (0, 1)])
    for plain, mixed in zip(*found):
        for name, value in plain.items():
            assert mixed[name].dtype == torch.float32
            # bf16 keeps 8 bits: about 1 % after some layers
            assert float(mixed[name].detach()) == pytest.approx(float(value.detach()), rel=0.05, abs=0.02)


# ---- inference ----


@pytest.mark.parametrize("changes", [{}, {"use_sdp": False}, SEVERAL])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 7)])
def test_inference_returns_what_it_says(changes, B, T):
    model, _ = model_and_batch(**changes)
    lengths = torch.tensor([max(1, T - i) for i in range(B)])
    ids = torch.arange(B) % 2 if changes is SEVERAL else None
    said = model.eval().inference(torch.randint(1, 20, (B, T)), lengths, ids)
    frames = said["durations"].sum(1)
    assert said["waveform"].shape == (B, 16 * frames.max())
    assert said["waveform"].abs().max() <= 1
    assert torch.equal(said["lengths"], 16 * frames)
    assert torch.equal(said["alignment"].sum(1).long(), said["durations"])
    assert torch.equal(said["alignment"].sum(2), (torch.arange(frames.max()) < frames[:, None]).float())
    for i, n in enumerate(lengths.tolist()):
        assert (said["durations"][i, :n] >= 1).all()
        assert (said["durations"][i, n:] == 0).all()


def test_inference_of_a_padded_batch_is_that_of_its_texts_alone():
    model, _ = model_and_batch()
    model.eval()
    tokens = torch.randint(1, 20, (2, 40))
    whole = model.inference(tokens, torch.tensor([40, 20]), noise_scale=0.0, noise_scale_w=0.0)
    alone = model.inference(tokens[1:, :20], noise_scale=0.0, noise_scale_w=0.0)
    assert torch.equal(whole["durations"][1, :20], alone["durations"][0])
    n = int(alone["lengths"][0])
    assert int(whole["lengths"][1]) == n < whole["waveform"].size(1)
    assert (whole["waveform"][1, n:] == 0).all()
    # The decoder has no mask: behind the end it sees zeros that went through a layer. Its reach: 3 frames before the
    # first stage, 2 frames of kernel and blocks in each of the two.
    reach = 16 * 7
    assert n > 2 * reach
    torch.testing.assert_close(
        whole["waveform"][1, : n - reach], alone["waveform"][0, : n - reach], atol=1e-5, rtol=1e-5
    )


def test_noise_and_length_scale():
    model, _ = model_and_batch()
    model.eval()
    tokens = torch.randint(1, 20, (1, 12))
    steady = [model.inference(tokens, noise_scale=0.0, noise_scale_w=0.0) for _ in range(2)]
    assert torch.equal(steady[0]["waveform"], steady[1]["waveform"])
    noisy = [model.inference(tokens, noise_scale=0.7, noise_scale_w=0.0) for _ in range(2)]
    assert torch.equal(noisy[0]["durations"], steady[0]["durations"])
    assert not torch.equal(noisy[0]["waveform"], noisy[1]["waveform"])
    varied = torch.cat([model.inference(tokens, noise_scale_w=2.0)["durations"] for _ in range(4)])
    assert (varied != varied[:1]).any()
    slow = model.inference(tokens, noise_scale=0.0, noise_scale_w=0.0, length_scale=3.0)["durations"]
    # rounded up after scaling: at most 3 times, and more than 3 times one frame less
    assert (slow <= 3 * steady[0]["durations"]).all()
    assert (slow > 3 * (steady[0]["durations"] - 1)).all()


def test_a_token_lasts_at_most_max_token_frames():
    model, _ = model_and_batch(use_sdp=False, max_token_frames=7)
    with torch.no_grad():
        model.dp.proj.bias.fill_(200.0)  # exp(200) is infinite in fp32
    said = model.eval().inference(torch.randint(1, 20, (1, 3)), length_scale=2.0)
    assert said["durations"].tolist() == [[14, 14, 14]]


def test_several_speakers_need_ids_and_sound_different():
    model, _ = model_and_batch(**SEVERAL)
    model.eval()
    tokens = torch.randint(1, 20, (1, 5))
    with pytest.raises(ValueError, match="this model has 2 speakers; give an id for each text"):
        model.inference(tokens)
    said = [model.inference(tokens, None, torch.tensor([i]), 0.0, 0.0)["waveform"] for i in (0, 1)]
    assert said[0].shape != said[1].shape or not torch.allclose(said[0], said[1], atol=1e-3)


def test_voice_conversion():
    model, batch = model_and_batch(**SEVERAL)
    model.eval()
    ids = torch.tensor([0, 1, 0])
    with steady_noise():
        same = model.voice_conversion(batch["waveform"], batch["wave_lengths"], ids, ids)
        other = model.voice_conversion(batch["waveform"], batch["wave_lengths"], ids, 1 - ids)
        # from a speaker to the same one the flow is undone: what is left is encoder and decoder
        g = model.emb_g(ids).unsqueeze(-1)
        mask = vits.sequence_mask(batch["spec_lengths"], batch["linear"].size(2))
        z, _, _ = model.enc_q(batch["linear"], mask, g)
        expected = model.dec(z, g).squeeze(1)
    spoken = vits.sequence_mask(batch["wave_lengths"] // 16 * 16, expected.size(1)).squeeze(1)
    torch.testing.assert_close(same["waveform"], (expected * spoken).detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(same["lengths"], batch["wave_lengths"] // 16 * 16)
    assert same["waveform"].shape == other["waveform"].shape
    assert not torch.allclose(same["waveform"], other["waveform"], atol=1e-3)


def test_voice_conversion_needs_several_speakers():
    model, batch = model_and_batch()
    ids = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="num_speakers=1: converting voices needs"):
        model.voice_conversion(batch["waveform"], batch["wave_lengths"], ids, ids)


# ---- what is shown ----


class Notes:
    """A dashboard that remembers what it was given."""

    def __init__(self):
        self.figures, self.audios = {}, {}

    def __getattr__(self, name):
        scope, kind = name.split("_")

        def note(step, values, rate=None):
            assert step == 7
            getattr(self, kind).update({f"{scope}/{key}": (value, rate) for key, value in values.items()})

        return note


def test_logs_show_alignment_mels_and_audio():
    model, batch = model_and_batch()
    outputs, _ = model.train_step(batch, None, 1)
    outputs = {f"{name}_1": value for name, value in outputs.items()}
    notes = Notes()
    with torch.no_grad():
        model.train_log(batch, outputs, notes, 7)
        model.eval_log(batch, outputs, notes, 7)
    assert model.training
    parts = ["alignment", "segment_real", "segment_generated"]
    assert sorted(notes.figures) == sorted(
        [f"{s}/{p}" for s in ("train", "eval") for p in parts] + ["eval/spoken", "eval/recorded"]
    )
    audios = ["segment_real", "segment_generated"]
    assert sorted(notes.audios) == sorted(
        [f"{s}/{p}" for s in ("train", "eval") for p in audios] + ["eval/spoken", "eval/recorded"]
    )
    assert all(
        isinstance(wave, np.ndarray) and wave.ndim == 1 and rate == 22050 for wave, rate in notes.audios.values()
    )
    n = int(batch["wave_lengths"][0])
    np.testing.assert_array_equal(notes.audios["eval/recorded"][0], batch["waveform"][0, :n])
    np.testing.assert_array_equal(notes.audios["train/segment_real"][0], outputs["real_1"][0, 0])
    drawn = notes.figures["train/alignment"][0].axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn, outputs["alignment_1"][0, : int(batch["spec_lengths"][0])].T)


def test_the_shortest_speech_is_shown():
    model, _ = model_and_batch()
    assert model._mel(torch.zeros(16)).shape == (10, 1)  # one frame, mirrored by 24 samples at each end


def test_test_run_speaks_the_sentences_into_the_runs_folder(tmp_path, monkeypatch):
    config = tiny(num_symbols=178, test_sentences=["One.", "And two."], **SEVERAL)
    model = Vits(config).eval()
    trainer = SimpleNamespace(output_path=tmp_path, total_steps_done=42)
    speakers, inference = [], model.inference
    monkeypatch.setattr(
        model, "inference", lambda *a, **k: speakers.append(k["speaker_ids"].tolist()) or inference(*a, **k)
    )
    with torch.inference_mode():
        outputs = model.test_run(trainer)
    assert speakers == [[0], [1]]
    notes = Notes()
    model.test_log(outputs, notes, 7)
    assert sorted(path.name for path in (tmp_path / "test_audios").iterdir()) == ["42-0.wav", "42-1.wav"]
    for i in (0, 1):
        path = tmp_path / "test_audios" / f"42-{i}.wav"
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (22050, 1, "PCM_16")
        wave, rate = notes.audios[f"test/{i}"]
        assert rate == 22050
        np.testing.assert_allclose(soundfile.read(path)[0], wave, atol=1 / 32768)
        assert f"test/{i}" in notes.figures


# ---- data ----


def test_collate_pads_and_keeps_the_lengths():
    samples = [
        {"name": "a", "text": "A", "tokens": torch.tensor([3, 4]), "waveform": torch.ones(5), "speaker": 1},
        {"name": "b", "text": "B", "tokens": torch.tensor([5]), "waveform": torch.ones(2), "speaker": 0},
    ]
    batch = vits.collate(samples)
    assert batch["tokens"].tolist() == [[3, 4], [5, 0]]
    assert batch["token_lengths"].tolist() == [2, 1]
    assert batch["waveform"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["wave_lengths"].tolist() == [5, 2]
    assert batch["speaker_ids"].tolist() == [1, 0]
    assert (batch["names"], batch["texts"]) == (["a", "b"], ["A", "B"])


def test_loader_to_losses_on_a_made_up_set(tiny_ljspeech, tmp_path):
    config = VitsConfig(
        **{**SMALL, "phonemes": False, "batch_size": 4, "eval_batch_size": 2, "cache_dir": str(tmp_path)}
    )
    model = Vits(config)
    samples = read_ljspeech(tiny_ljspeech)
    train_loader = model.get_data_loader(config, is_eval=False, samples=samples, verbose=False)
    eval_loader = model.get_data_loader(config, is_eval=True, samples=samples, verbose=False)
    batches = list(train_loader)
    train_loader.batch_sampler.set_epoch(1)
    assert [batch["names"] for batch in train_loader] != [batch["names"] for batch in batches]
    assert sorted(name for batch in batches for name in batch["names"]) == [s.name for s in samples]
    assert [name for batch in eval_loader for name in batch["names"]] == [s.name for s in samples]
    assert [len(batch["names"]) for batch in batches] == [4, 4]
    batch = model.format_batch_on_device(model.format_batch(batches[0]))
    recorded = {sample.name: soundfile.read(sample.path)[0] for sample in samples}
    for i, name in enumerate(batch["names"]):
        n = int(batch["wave_lengths"][i])
        np.testing.assert_array_equal(batch["waveform"][i, :n].double(), recorded[name])
        assert int(batch["spec_lengths"][i]) == n // 256
    with torch.no_grad():
        losses = [model.train_step(batch, None, i)[1]["loss"] for i in (0, 1)]
    assert all(torch.isfinite(loss) for loss in losses)


def test_a_step_on_real_speech(ljspeech_sample, tmp_path):
    config = VitsConfig(**{**SMALL, "phonemes": False, "batch_size": 4, "cache_dir": str(tmp_path)})
    model = Vits(config)
    loader = model.get_data_loader(config, is_eval=False, samples=read_ljspeech(ljspeech_sample)[:4], verbose=False)
    batch = model.format_batch_on_device(next(iter(loader)))
    losses = train(model, batch, steps=4, lr=1e-3)
    assert losses[-1]["loss_mel"] < losses[0]["loss_mel"]


def test_more_speakers_than_names_and_too_few_symbols_are_refused(tmp_path):
    samples = [SpeechSample("a", "a.wav", "A.", "anna"), SpeechSample("b", "b.wav", "B.", "bert")]
    config = tiny(num_symbols=178, **SEVERAL)
    with pytest.raises(DataError, match=r"name the 2 speakers; the samples have \['anna', 'bert'\]"):
        Vits(config).get_data_loader(config, False, samples, False)
    config.speakers = ["anna", "bert"]
    assert vits.speaker_ids_of(config, samples) == {"anna": 0, "bert": 1}
    config = tiny()
    assert vits.speaker_ids_of(config, samples) is None
    with pytest.raises(DataError, match="num_symbols=20: the tokenizer gives 178 symbols"):
        Vits(config).get_data_loader(config, False, samples, False)


# ---- config ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"win_length": 2048}, "win_length=2048: must be at most filter_length=1024"),
        ({"hop_length": 255}, "hop_length=255: filter_length=1024 less it must be even"),
        ({"segment_size": 8000}, "segment_size=8000: must be a multiple of hop_length=256"),
        ({"segment_size": 1024}, "segment_size=1024: must be a multiple of hop_length=256 above filter_length"),
        ({"mel_fmax": 12000.0}, "mel_fmax=12000.0: must rise, up to sample_rate / 2 = 11025 Hz"),
        ({"mel_fmin": 900.0, "mel_fmax": 800.0}, "mel_fmin=900.0, mel_fmax=800.0: must rise"),
        ({"upsample_rates": [8, 8, 2, 4]}, r"upsample_rates=\[8, 8, 2, 4\]: their product must be hop_length=256"),
        ({"upsample_kernel_sizes": [16, 16, 4]}, "must be as many as upsample_rates"),
        ({"upsample_kernel_sizes": [16, 16, 3, 4]}, "3 less rate 2 must be even, not < 0"),
        ({"upsample_initial_channel": 100}, "upsample_initial_channel=100: must be a multiple of 16"),
        ({"resblock_kernel_sizes": [3, 7]}, "resblock_dilation_sizes=.*one list is needed for each"),
        ({"resblock_kernel_sizes": [3, 7, 10]}, r"resblock_kernel_sizes=\[3, 7, 10\]: must be odd"),
        ({"resblock_dilation_sizes": [[1], [], [1]]}, "must be lists of numbers of at least 1"),
        ({"resblock": "3"}, "resblock='3': must be one of '1', '2'"),
        ({"n_heads": 5}, "n_heads=5: must divide hidden_channels=192"),
        ({"inter_channels": 191}, "inter_channels=191: must be even"),
        ({"wn_kernel_size": 4}, "wn_kernel_size=4: must be odd"),
        ({"num_speakers": 3}, "gin_channels=0 with num_speakers=3: several speakers need gin_channels"),
        ({"gin_channels": 256}, "gin_channels=256 with num_speakers=1"),
        ({"num_speakers": 3, "gin_channels": 8, "speakers": ["a", "b"]}, "num_speakers=3: speakers has 2 names"),
        ({"betas": [0.8]}, r"betas=\[0.8\]: must be two numbers"),
        ({"lr": [1e-4]}, r"lr=\[0.0001\]: must be one number, or"),
        ({"disc_periods": [2, 8192]}, r"disc_periods=\[2, 8192\]: must be below segment_size=8192"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0: must be at least 0"),
        ({"disc_periods": []}, r"disc_periods=\[\]: at least one number is needed"),
    ],
)
def test_config_refuses_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        VitsConfig(**changes)


def test_problems_of_weights_and_config_name_fields_that_exist():
    named = {name for _, names in vits._FIELDS for name in names.split(", ")}
    assert named <= set(VitsConfig.__dataclass_fields__)


def test_config_lists_all_problems_at_once():
    with pytest.raises(ValueError, match="VitsConfig: 2 problems") as error:
        VitsConfig(n_heads=5, wn_kernel_size=4)
    assert len(str(error.value).splitlines()) == 3


def test_default_config_is_the_papers():
    config = VitsConfig()
    found = (config.inter_channels, config.hidden_channels, config.filter_channels, config.n_heads, config.n_layers)
    assert found == (192, 192, 768, 2, 6)
    assert (config.batch_size, config.sample_rate, config.segment_size, config.lr) == (64, 22050, 8192, 2e-4)
    assert (config.c_mel, config.c_kl, config.lr_decay, config.num_symbols) == (45, 1, 0.999875, 178)


def test_the_small_model_is_small():
    assert sum(p.numel() for p in Vits(VitsConfig(**SMALL)).parameters()) < 1.2e6
