"""The layers of models/vits.py: a Case for each, and what they compute against loops, autograd and transformers."""

import ast
import math
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import vits
from models.vits import VitsConfig
from trainer.testing import Case, moved

TINY = {
    "num_symbols": 20,
    "filter_length": 64,
    "win_length": 64,
    "hop_length": 16,
    "n_mel_channels": 10,
    "segment_size": 128,
    "inter_channels": 8,
    "hidden_channels": 16,
    "filter_channels": 32,
    "n_layers": 2,
    "posterior_layers": 3,
    "n_flows": 2,
    "flow_layers": 2,
    "dp_filter_channels": 12,
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 2]],
    "upsample_rates": [4, 4],
    "upsample_kernel_sizes": [8, 8],
    "upsample_initial_channel": 16,
    "disc_periods": [2, 3],
    "disc_period_channels": [4, 8],
    "disc_scale_channels": [4, 16, 8],
    "batch_size": 4,
    "phonemes": False,
}


def tiny(**changes) -> VitsConfig:
    return VitsConfig(**{**TINY, **changes})


def mask(B: int, T: int) -> torch.Tensor:
    """[B, 1, T] of sequences of T, T - 3, T - 6 ... positions."""
    lengths = torch.tensor([max(1, T - 3 * i) for i in range(B)])
    return vits.sequence_mask(lengths, T)


def batch_of(config: VitsConfig, B: int, T: int) -> dict:
    """A batch as the loader gives it: texts of T, T - 1 ... tokens and about two frames for each."""
    generator = torch.Generator().manual_seed(0)
    token_lengths = torch.tensor([max(1, T - i) for i in range(B)])
    wave_lengths = (2 * token_lengths + config.segment_size // config.hop_length) * config.hop_length + 5
    size = int(wave_lengths.max())
    is_in = torch.arange(size) < wave_lengths[:, None]
    return {
        "tokens": torch.randint(1, config.num_symbols, (B, T), generator=generator)
        * (torch.arange(T) < token_lengths[:, None]),
        "token_lengths": token_lengths,
        "waveform": 0.3 * torch.randn(B, size, generator=generator).clamp(-1, 1) * is_in,
        "wave_lengths": wave_lengths,
        "speaker_ids": torch.arange(B) % config.num_speakers,
        "names": [f"clip{i}" for i in range(B)],
        "texts": ["text"] * B,
    }


def steady_noise():
    """Noise that depends on the position alone, so that more padding does not change it."""
    return mock.patch("torch.randn_like", lambda x: torch.cos(7.0 * torch.arange(x.size(-1))).expand_as(x).clone())


def with_steady_noise(layer, *inputs):
    with steady_noise():
        return layer(*inputs)


def both_losses(model, batch):
    """The losses of the discriminator's and the generator's pass."""
    batch = model.format_batch_on_device(dict(batch))
    return [model.train_step(batch, None, i)[1]["loss"] for i in (0, 1)]


def channels(C):
    return lambda B, T: (torch.randn(B, C, T), mask(B, T))


KEY_BIAS = "a softmax ignores what is the same for all keys"
SEVERAL = {"num_speakers": 2, "gin_channels": 6}
WAVES = {
    "sizes": ((1, 40), (2, 47)),
    "inputs": lambda B, T: (torch.randn(B, 1, T),),
    "no_padding": "judges segments, which are whole",
}

LAYERS = {
    "LayerNorm": Case(
        build=lambda: vits.LayerNorm(8),
        inputs=lambda B, T: (torch.randn(B, 8, T),),
        shapes=lambda B, T: (B, 8, T),
        no_padding="works on each position alone",
    ),
    "MultiHeadAttention": Case(
        build=lambda: vits.MultiHeadAttention(8, 2, 3),
        inputs=channels(8),
        shapes=lambda B, T: (B, 8, T),
        mask=1,
        no_grad_for={"conv_k.bias": KEY_BIAS},
    ),
    "FFN": Case(build=lambda: vits.FFN(8, 16, 3, 0.1), inputs=channels(8), shapes=lambda B, T: (B, 8, T), mask=1),
    "Encoder": Case(
        build=lambda: vits.Encoder(tiny()),
        inputs=channels(16),
        shapes=lambda B, T: (B, 16, T),
        mask=1,
        no_grad_for={f"attn_layers.{i}.conv_k.bias": KEY_BIAS for i in (0, 1)},
    ),
    "TextEncoder": Case(
        build=lambda: vits.TextEncoder(tiny()),
        inputs=lambda B, T: (torch.randint(0, 20, (B, T)), mask(B, T)),
        shapes=lambda B, T: [(B, 16, T), (B, 8, T), (B, 8, T)],
        mask=1,
        no_grad_for={f"encoder.attn_layers.{i}.conv_k.bias": KEY_BIAS for i in (0, 1)},
    ),
    "WN": Case(
        build=lambda: vits.WN(8, 5, 3, gin_channels=6),
        inputs=lambda B, T: (torch.randn(B, 8, T), mask(B, T), torch.randn(B, 6, 1)),
        shapes=lambda B, T: (B, 8, T),
        mask=1,
        call=lambda layer, x, m, g: layer(x * m, m, g),  # its callers mask
    ),
    "PosteriorEncoder": Case(
        build=lambda: vits.PosteriorEncoder(tiny(**SEVERAL)),
        inputs=lambda B, T: (torch.randn(B, 33, T), mask(B, T), torch.randn(B, 6, 1)),
        shapes=lambda B, T: [(B, 8, T)] * 3,
        mask=1,
        call=with_steady_noise,
    ),
    "Flip": Case(
        build=vits.Flip,
        inputs=channels(8),
        shapes=lambda B, T: [(B, 8, T), (B,)],
        mask=1,
        no_learning="it has no parameters",
    ),
    "ResidualCouplingLayer": Case(
        build=lambda: vits.ResidualCouplingLayer(8, 16, 5, 2, gin_channels=6),
        inputs=lambda B, T: (torch.randn(B, 8, T), mask(B, T), torch.randn(B, 6, 1)),
        shapes=lambda B, T: [(B, 8, T), (B,)],
        mask=1,
    ),
    "ResidualCouplingBlock": Case(
        build=lambda: vits.ResidualCouplingBlock(tiny(**SEVERAL)),
        inputs=lambda B, T: (torch.randn(B, 8, T), mask(B, T), torch.randn(B, 6, 1)),
        shapes=lambda B, T: (B, 8, T),
        mask=1,
    ),
    "ElementwiseAffine": Case(
        build=lambda: vits.ElementwiseAffine(2),
        inputs=channels(2),
        shapes=lambda B, T: [(B, 2, T), (B,)],
        mask=1,
    ),
    "DDSConv": Case(
        build=lambda: vits.DDSConv(8, 3, 3, 0.1),
        inputs=lambda B, T: (torch.randn(B, 8, T), mask(B, T), torch.randn(B, 8, T)),
        shapes=lambda B, T: (B, 8, T),
        mask=1,
        padded=(0, 2),
    ),
    "ConvFlow": Case(
        build=lambda: vits.ConvFlow(8, 3, 3),
        inputs=lambda B, T: (2 * torch.randn(B, 2, T), mask(B, T), torch.randn(B, 8, T)),
        shapes=lambda B, T: [(B, 2, T), (B,)],
        mask=1,
        padded=(0, 2),
    ),
    "StochasticDurationPredictor": Case(
        build=lambda: vits.StochasticDurationPredictor(8, 0.1, gin_channels=6),
        inputs=lambda B, T: (
            torch.randn(B, 8, T),
            mask(B, T),
            torch.randint(1, 6, (B, 1, T)).float() * mask(B, T),
            torch.randn(B, 6, 1),
        ),
        shapes=lambda B, T: (B,),
        mask=1,
        padded=(0, 2),
        call=with_steady_noise,
    ),
    "DurationPredictor": Case(
        build=lambda: vits.DurationPredictor(8, 12, 0.1, gin_channels=6),
        inputs=lambda B, T: (torch.randn(B, 8, T), mask(B, T), torch.randn(B, 6, 1)),
        shapes=lambda B, T: (B, 1, T),
        mask=1,
    ),
    "ResBlock1": Case(
        build=lambda: vits.ResBlock1(6, 3, [1, 3, 5]),
        inputs=lambda B, T: (torch.randn(B, 6, T),),
        shapes=lambda B, T: (B, 6, T),
        no_padding="the decoder's, which works on whole segments",
    ),
    "ResBlock2": Case(
        build=lambda: vits.ResBlock2(6, 3, [1, 3]),
        inputs=lambda B, T: (torch.randn(B, 6, T),),
        shapes=lambda B, T: (B, 6, T),
        no_padding="the decoder's, which works on whole segments",
    ),
    "Generator": Case(
        build=lambda: vits.Generator(tiny(**SEVERAL)),
        inputs=lambda B, T: (torch.randn(B, 8, T), torch.randn(B, 6, 1)),
        shapes=lambda B, T: (B, 1, 16 * T),
        no_padding="works on whole segments",
    ),
    "DiscriminatorP": Case(
        build=lambda: vits.DiscriminatorP(3, [4, 8, 8]),
        shapes=lambda B, T: [(B, 6), [(B, 4, 6 if T > 42 else 5, 3), (B, 8, 2, 3), (B, 8, 2, 3), (B, 1, 2, 3)]],
        **WAVES,
    ),
    "DiscriminatorS": Case(
        build=lambda: vits.DiscriminatorS([4, 16, 8]),
        shapes=lambda B, T: [(B, -(-T // 4)), [(B, 4, T), (B, 16, -(-T // 4)), (B, 8, -(-T // 4)), (B, 1, -(-T // 4))]],
        **WAVES,
    ),
    "MultiPeriodDiscriminator": Case(
        build=lambda: vits.MultiPeriodDiscriminator(tiny(disc_periods=[5], disc_period_channels=[4, 4])),
        shapes=lambda B, T: [
            [(B, -(-T // 4)), (B, 5 * (3 if T < 46 else 4))],
            [
                [(B, 4, T), (B, 16, -(-T // 4)), (B, 8, -(-T // 4)), (B, 1, -(-T // 4))],
                [(B, c, 3 if T < 46 else 4, 5) for c in (4, 4, 1)],
            ],
        ],
        **WAVES,
    ),
    "Vits": Case(
        build=lambda: vits.Vits(tiny(**SEVERAL)),
        inputs=lambda B, T: (batch_of(tiny(**SEVERAL), B, T),),
        shapes=lambda B, T: [(), ()],
        call=both_losses,
        no_grad_for={f"enc_p.encoder.attn_layers.{i}.conv_k.bias": KEY_BIAS for i in (0, 1)},
        no_padding="test_vits_model.py checks its inference",
        no_learning="test_vits_model.py trains it",
    ),
}


def test_the_file_imports_torch_the_standard_library_and_trainer_only():
    tree = ast.parse(Path(vits.__file__).read_text(encoding="utf8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"torch", "trainer"}


def test_the_default_config_has_the_authors_numbers_of_parameters():
    with torch.device("meta"):
        model = vits.Vits(VitsConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    discriminator = sum(size for name, size in sizes.items() if name.startswith("disc."))
    # counted with the authors' SynthesizerTrn(178, 513, 32, ...) and MultiPeriodDiscriminator()
    assert sum(sizes.values()) - discriminator == 36_321_072
    assert discriminator == 46_747_132


def test_scale_discriminator_has_the_authors_groups_and_strides():
    with torch.device("meta"):
        convs = vits.DiscriminatorS(VitsConfig().disc_scale_channels).convs
    assert [conv.groups for conv in convs] == [1, 4, 16, 64, 256, 1]
    assert [conv.stride for conv in convs] == [(1,), (4,), (4,), (4,), (4,), (1,)]
    assert [conv.kernel_size for conv in convs] == [(15,), (41,), (41,), (41,), (41,), (5,)]


def test_layer_norm_is_torchs_over_channels():
    x = torch.randn(2, 6, 5)
    layer = moved(vits.LayerNorm(6), seed=0)
    expected = nn.LayerNorm(6)
    expected.weight, expected.bias = layer.gamma, layer.beta
    for t in range(5):
        torch.testing.assert_close(layer(x)[:, :, t], expected(x[:, :, t]))


@pytest.mark.parametrize("T", [1, 2, 3, 4, 9])
def test_band_and_square_by_loops(T):
    w = 3
    band, square = torch.randn(2, T, 2 * w + 1), torch.randn(2, T, T)
    expected_square, expected_band = torch.zeros(2, T, T), torch.zeros(2, T, 2 * w + 1)
    for i in range(T):
        for j in range(T):
            if abs(j - i) <= w:
                expected_square[:, i, j] = band[:, i, j - i + w]
                expected_band[:, i, j - i + w] = square[:, i, j]
    assert torch.equal(vits.band_to_square(band), expected_square)
    assert torch.equal(vits.square_to_band(square, 2 * w + 1), expected_band)


@pytest.mark.parametrize("T", [1, 3, 12])
def test_attention_by_loops(T):
    """Shaw et al. eq. 3 and 4, one query at a time."""
    heads, size, w = 2, 4, 2
    layer = moved(vits.MultiHeadAttention(heads * size, heads, w), seed=0).eval()
    x, is_in = torch.randn(2, heads * size, T), mask(2, T)
    q, k, v = (conv(x) for conv in (layer.conv_q, layer.conv_k, layer.conv_v))
    y = torch.zeros_like(q)
    for b in range(2):
        n = int(is_in[b].sum())
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(n):
                scores, values = [], []
                for j in range(n):
                    near = abs(j - i) <= w
                    a_k = layer.emb_rel_k[0, j - i + w] if near else torch.zeros(size)
                    a_v = layer.emb_rel_v[0, j - i + w] if near else torch.zeros(size)
                    scores.append(q[b, part, i] @ (k[b, part, j] + a_k) / math.sqrt(size))
                    values.append(v[b, part, j] + a_v)
                y[b, part, i] = torch.stack(scores).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(layer(x, is_in) * is_in, layer.conv_o(y) * is_in)


def jacobian_log_det(layer, x, *more) -> torch.Tensor:
    """log|det| of the layer's map of x [1, C, T], by autograd."""
    jacobian = torch.autograd.functional.jacobian(lambda value: layer(value, *more)[0], x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()))[1]


FLOWS = {
    "coupling": (lambda: vits.ResidualCouplingLayer(2, 8, 5, 2, gin_channels=3), lambda T: torch.randn(1, 3, 1)),
    "affine": (lambda: vits.ElementwiseAffine(2), lambda T: None),
    "spline": (lambda: vits.ConvFlow(8, 3, 2), lambda T: torch.randn(1, 8, T)),
    "flip": (vits.Flip, lambda T: None),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flow_is_invertible_and_its_log_determinant_is_the_jacobians(name):
    build, condition = FLOWS[name]
    torch.manual_seed(0)
    layer, x = moved(build(), seed=3, by=0.5), 2 * torch.randn(1, 2, 4)
    g, ones = condition(4), torch.ones(1, 1, 4)
    y, log_det = layer(x, ones, g)
    assert name == "flip" or not torch.allclose(y, x, atol=1e-2)
    torch.testing.assert_close(layer(y, ones, g, reverse=True)[0], x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det[0], jacobian_log_det(layer, x, ones, g), atol=1e-5, rtol=1e-5)


def test_reversed_flows_have_the_opposite_log_determinant():
    for build in (lambda: vits.ElementwiseAffine(2), lambda: vits.ConvFlow(8, 3, 2)):
        layer, x, ones = moved(build(), seed=3), torch.randn(3, 2, 4), torch.ones(3, 1, 4)
        y, forward = layer(x, ones)
        torch.testing.assert_close(layer(y, ones, reverse=True)[1], -forward, atol=1e-5, rtol=1e-5)


def test_flow_block_is_invertible_and_uses_the_speaker():
    layer = moved(vits.ResidualCouplingBlock(tiny(**SEVERAL)), seed=0)
    x, is_in, g = torch.randn(2, 8, 9), mask(2, 9), torch.randn(2, 6, 1)
    x = x * is_in
    y = layer(x, is_in, g)
    torch.testing.assert_close(layer(y, is_in, g, reverse=True), x, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer(y, is_in, g + 1, reverse=True), x, atol=1e-3)


def test_new_flows_begin_as_the_identity():
    x, ones = torch.randn(2, 8, 5), torch.ones(2, 1, 5)
    assert torch.equal(vits.ResidualCouplingLayer(8, 16, 5, 2)(x, ones)[0], x)
    torch.testing.assert_close(vits.ResidualCouplingBlock(tiny())(x, ones), x)  # two flips


def test_posterior_is_the_normal_that_it_says():
    layer = moved(vits.PosteriorEncoder(tiny()), seed=0).eval()
    x, ones = torch.randn(1, 33, 4), torch.ones(1, 1, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        draws, m_q, logs_q = layer(x.expand(2000, -1, -1), ones)
    m_q, logs_q = m_q[0], logs_q[0]
    # means of 2,000 draws lie within 5 standard errors; a standard deviation's error is 1 / sqrt(2 * 2,000) of it
    assert ((draws.mean(0) - m_q).abs() < 5 * logs_q.exp() / math.sqrt(2000)).all()
    assert ((draws.std(0) / logs_q.exp() - 1).abs() < 5 / math.sqrt(4000)).all()


def test_period_discriminator_judges_each_phase_alone():
    layer, x = vits.DiscriminatorP(3, [4, 8]), torch.randn(2, 1, 28)
    padded = torch.cat([x, x[..., 26:27], x[..., 25:26]], dim=2)  # mirrored to 30
    phases = []
    for p in range(3):
        h = padded[:, :, p::3]
        for conv, stride in zip(layer.convs, (3, 1)):
            h = F.leaky_relu(F.conv1d(h, conv.weight[..., 0], conv.bias, stride, padding=2), 0.1)
        phases.append(F.conv1d(h, layer.conv_post.weight[..., 0], layer.conv_post.bias, padding=1))
    scores, features = layer(x)
    torch.testing.assert_close(scores, torch.stack(phases, dim=-1).flatten(1))
    assert len(features) == 3
    assert torch.equal(features[-1].flatten(1), scores)


def test_scale_discriminator_is_its_convolutions():
    layer, x = vits.DiscriminatorS([4, 16, 8]), torch.randn(2, 1, 50)
    h = F.leaky_relu(F.conv1d(x, layer.convs[0].weight, layer.convs[0].bias, padding=7), 0.1)
    h = F.leaky_relu(F.conv1d(h, layer.convs[1].weight, layer.convs[1].bias, 4, 20, groups=4), 0.1)
    h = F.leaky_relu(F.conv1d(h, layer.convs[2].weight, layer.convs[2].bias, padding=2), 0.1)
    h = F.conv1d(h, layer.conv_post.weight, layer.conv_post.bias, padding=1)
    torch.testing.assert_close(layer(x)[0], h.flatten(1))


def test_residual_block_2_by_its_formula():
    layer, x = vits.ResBlock2(4, 3, [1, 3]), torch.randn(1, 4, 11)
    h = x + F.conv1d(F.leaky_relu(x, 0.1), layer.convs[0].weight, layer.convs[0].bias, padding=1)
    h = h + F.conv1d(F.leaky_relu(h, 0.1), layer.convs[1].weight, layer.convs[1].bias, padding=3, dilation=3)
    torch.testing.assert_close(layer(x), h)


def test_decoder_averages_its_blocks():
    config = tiny(resblock="2", upsample_rates=[16], upsample_kernel_sizes=[32])
    layer, z = vits.Generator(config), torch.randn(1, 8, 3)
    h = layer.ups[0](F.leaky_relu(layer.conv_pre(z), 0.1))
    h = (layer.resblocks[0](h) + layer.resblocks[1](h)) / 2
    h = torch.tanh(F.conv1d(F.leaky_relu(h, 0.01), layer.conv_post.weight, padding=3))
    torch.testing.assert_close(layer(z), h)
