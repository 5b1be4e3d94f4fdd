"""The pure functions of models/vits.py, against other libraries, formulas and plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from models import vits


def test_sequence_mask():
    expected = torch.tensor([[[1.0, 1, 1]], [[1, 0, 0]], [[0, 0, 0]]])
    assert torch.equal(vits.sequence_mask(torch.tensor([3, 1, 0]), 3), expected)


# ---- spectrograms ----


@pytest.mark.parametrize(
    ("rate", "size", "mels", "fmin", "fmax"),
    [
        (22050, 1024, 80, 0.0, None),
        (16000, 512, 40, 50.0, 7600.0),
        (22050, 1024, 80, 1200.0, 8000.0),
        (8000, 64, 5, 0, None),
    ],
)
def test_mel_filterbank_is_librosas(rate, size, mels, fmin, fmax):
    import librosa

    expected = librosa.filters.mel(sr=rate, n_fft=size, n_mels=mels, fmin=fmin, fmax=fmax)
    found = vits.mel_filterbank(rate, size, mels, fmin, fmax)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8, rtol=1e-5)


def waves(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    wave = 0.2 * torch.randn(len(lengths), max(lengths))
    lengths = torch.tensor(lengths)
    return wave * (torch.arange(wave.size(1)) < lengths[:, None]), lengths


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 4), (3, 0), (4, 4)])
def test_mirror_is_reflect_padding(left, right):
    x = torch.randn(2, 1, 5)
    assert torch.equal(vits.mirror(x, left, right), torch.nn.functional.pad(x, (left, right), "reflect"))


def test_mirror_refuses_what_is_too_short():
    with pytest.raises(ValueError, match="5 samples cannot be mirrored for 5 of padding"):
        vits.mirror(torch.randn(1, 1, 5), 0, 5)


def test_reflect_pad_mirrors_every_clip_at_its_own_end():
    wave, lengths = waves(50, 31, 12)
    padded = vits.reflect_pad(wave, lengths, 10)
    for i, n in enumerate(lengths.tolist()):
        expected = np.pad(wave[i, :n].numpy(), 10, mode="reflect")
        np.testing.assert_array_equal(padded[i, : n + 20].numpy(), expected)


def test_linear_spectrogram_by_numpy_frame_by_frame():
    size, hop, win = 512, 128, 400
    wave, lengths = waves(4000, 2600)
    found = vits.linear_spectrogram(wave, size, hop, win, lengths)
    assert found.shape == (2, size // 2 + 1, 4000 // hop)
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win) / win), (size - win) // 2)
    for i, n in enumerate(lengths.tolist()):
        padded = np.pad(wave[i, :n].double().numpy(), (size - hop) // 2, mode="reflect")
        for f in range(n // hop):
            spectrum = np.fft.rfft(padded[f * hop : f * hop + size] * window)
            # fp32 against fp64: magnitudes up to about 20, sums of 512 terms
            np.testing.assert_allclose(found[i, :, f], np.sqrt(np.abs(spectrum) ** 2 + 1e-6), atol=2e-5)
        assert (found[i, :, n // hop :] == 0).all()


def test_linear_spectrogram_of_equally_long_clips_needs_no_lengths():
    wave, lengths = waves(1024, 1024)
    assert torch.equal(vits.linear_spectrogram(wave, 64, 16, 64), vits.linear_spectrogram(wave, 64, 16, 64, lengths))


def test_linear_spectrogram_does_not_depend_on_padding():
    wave, lengths = waves(700, 300)
    short = vits.linear_spectrogram(wave[1:, :300], 64, 16, 64, lengths[1:])
    garbage = wave.clone()
    garbage[1, 300:] = 100.0
    assert torch.equal(vits.linear_spectrogram(garbage, 64, 16, 64, lengths)[1:, :, :18], short)


def test_spectrograms_stay_in_fp32_under_autocast():
    wave, _ = waves(256)
    filters = vits.mel_filterbank(8000, 64, 10)
    expected = vits.log_mel(vits.linear_spectrogram(wave, 64, 16, 64), filters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vits.log_mel(vits.linear_spectrogram(wave.bfloat16().float(), 64, 16, 64), filters)
    assert found.dtype == torch.float32
    # the input was rounded to 8 bits, nothing after it
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)


def test_log_mel_is_clamped():
    filters, linear = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 0.0], [0.5, 0.0]]])
    torch.testing.assert_close(vits.log_mel(linear, filters), torch.tensor([[[math.log(4.0), math.log(1e-5)]]]))


# ---- segments ----


def test_random_starts_are_uniform_and_fit():
    torch.manual_seed(0)
    starts = vits.random_starts(torch.tensor([10, 8, 5]).repeat(3000), 8).view(3000, 3)
    for column, possible in enumerate([3, 1, 1]):
        counts = starts[:, column].bincount(minlength=possible)
        assert len(counts) == possible
        # 1,000 expected of each of three, standard deviation 26
        assert (counts - 3000 / possible).abs().max() < 130


def test_slice_segments_by_slicing():
    x, starts = torch.randn(3, 2, 12), torch.tensor([0, 5, 8])
    expected = torch.stack([x[i, :, s : s + 4] for i, s in enumerate([0, 5, 8])])
    assert torch.equal(vits.slice_segments(x, starts, 4), expected)


def test_slice_segments_refuses_a_batch_shorter_than_a_segment():
    with pytest.raises(ValueError, match="a segment of 4 does not fit into a batch padded to 3"):
        vits.slice_segments(torch.randn(1, 2, 3), torch.tensor([0]), 4)


# ---- alignment ----


def best_by_trying_all(score_FT: np.ndarray) -> float:
    """The highest sum over all ways to give each frame a token, monotonic and without a gap."""
    frames, tokens = score_FT.shape
    sums = []
    for starts in itertools.combinations(range(1, frames), tokens - 1):
        edges = [0, *starts, frames]
        sums.append(sum(score_FT[edges[t] : edges[t + 1], t].sum() for t in range(tokens)))
    return max(sums)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (5, 1), (4, 4), (7, 3), (9, 5)])
def test_alignment_is_the_best_of_all(frames, tokens):
    torch.manual_seed(frames * 10 + tokens)
    score = torch.randn(8, frames + 2, tokens + 1)
    path = vits.search_alignment(score, torch.full((8,), frames), torch.full((8,), tokens))
    for i in range(8):
        assert path[i, frames:].sum() == path[i, :, tokens:].sum() == 0
        way = path[i, :frames, :tokens]
        assert torch.equal(way.sum(1), torch.ones(frames))
        steps = way.argmax(1).diff()
        assert way[0, 0] == way[-1, -1] == 1
        assert ((steps == 0) | (steps == 1)).all()
        best = best_by_trying_all(score[i, :frames, :tokens].double().numpy())
        assert float((way * score[i, :frames, :tokens]).sum()) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_alignment_is_that_of_the_package(ties):
    from monotonic_alignment_search import maximum_path

    torch.manual_seed(0)
    token_lengths = torch.tensor([20, 7, 1, 13, 20])
    frame_lengths = torch.tensor([41, 60, 9, 13, 20])
    score = torch.randn(5, 60, 20) * 30
    if ties:
        score = score.sign()
    is_in = vits.sequence_mask(frame_lengths, 60).mT * vits.sequence_mask(token_lengths, 20)
    expected = maximum_path((score * is_in).mT.contiguous(), is_in.mT.contiguous()).mT
    assert torch.equal(vits.search_alignment(score, frame_lengths, token_lengths), expected)


def test_alignment_ignores_what_padding_holds():
    score, frames, tokens = torch.randn(2, 9, 5), torch.tensor([9, 6]), torch.tensor([5, 3])
    expected = vits.search_alignment(score, frames, tokens)
    for value in (1e6, -1e6):
        score[1, 6:], score[1, :, 3:] = value, value
        assert torch.equal(vits.search_alignment(score, frames, tokens), expected)


def test_path_of_durations_repeats_each_token():
    durations = torch.tensor([[2, 0, 3], [1, 1, 0]])
    path = vits.path_of_durations(durations, 6)
    for i, row in enumerate(durations.tolist()):
        tokens = [t for t, n in enumerate(row) for _ in range(n)]
        expected = torch.zeros(6, 3)
        expected[range(len(tokens)), tokens] = 1
        assert torch.equal(path[i], expected)


def test_prior_scores_are_log_densities():
    z, m, logs = torch.randn(2, 4, 6), torch.randn(2, 4, 3), 0.3 * torch.randn(2, 4, 3)
    density = Normal(m[:, :, None, :], logs.exp()[:, :, None, :]).log_prob(z[:, :, :, None]).sum(1)
    torch.testing.assert_close(vits.prior_scores(z, m, logs), density, atol=1e-4, rtol=1e-5)


def test_expanded_priors_are_the_tokens_priors():
    m, logs = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    path = vits.path_of_durations(torch.tensor([[2, 1, 4]]), 7)
    repeats = torch.tensor([2, 1, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vits.expand_prior(m, logs, path)
    assert torch.equal(found[0], m.repeat_interleave(repeats, dim=2))
    assert torch.equal(found[1], logs.repeat_interleave(repeats, dim=2))


# ---- spline ----


def spline_inputs(n: int = 400, bins: int = 10) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.linspace(-7, 7, n, dtype=torch.float64)
    return x, *(torch.randn(n, k, dtype=torch.float64) for k in (bins, bins, bins - 1))


@pytest.mark.parametrize("inverse", [False, True])
def test_spline_is_that_of_transformers(inverse):
    from transformers.models.vits.modeling_vits import _unconstrained_rational_quadratic_spline

    inputs = spline_inputs()
    found = vits.rational_quadratic_spline(*inputs, bound=5.0, inverse=inverse)
    expected = _unconstrained_rational_quadratic_spline(*inputs, reverse=inverse, tail_bound=5.0)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_spline_has_an_inverse_and_its_slope_is_the_derivative():
    x, *logits = spline_inputs()
    x.requires_grad_()
    y, log_slope = vits.rational_quadratic_spline(x, *logits, bound=5.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), atol=1e-9, rtol=1e-9)
    back, inverse_slope = vits.rational_quadratic_spline(y, *logits, bound=5.0, inverse=True)
    torch.testing.assert_close(back, x, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(inverse_slope, -log_slope, atol=1e-6, rtol=1e-6)


def test_spline_is_the_identity_outside_and_maps_its_ends_to_themselves():
    x = torch.tensor([-100.0, -5.0, 5.0, 6.0])
    logits = (torch.randn(4, 10), torch.randn(4, 10), torch.randn(4, 9))
    for inverse in (False, True):
        y, log_slope = vits.rational_quadratic_spline(x, *logits, bound=5.0, inverse=inverse)
        torch.testing.assert_close(y, x)
        assert log_slope[0] == log_slope[3] == 0


def test_splines_gradients_stay_finite_outside():
    x = torch.tensor([-1e6, -5.0, 0.0, 5.0, 1e6], requires_grad=True)
    logits = [torch.randn(5, k, requires_grad=True) for k in (10, 10, 9)]
    for inverse in (False, True):
        y, log_slope = vits.rational_quadratic_spline(x, *logits, bound=5.0, inverse=inverse)
        gradients = torch.autograd.grad((y + log_slope).sum(), [x, *logits])
        assert all(torch.isfinite(g).all() for g in gradients)
        assert gradients[0][0] == gradients[0][4] == 1


# ---- losses ----


def test_least_squares_losses_by_hand():
    real, generated = (
        [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]])],
        [torch.tensor([[0.5, 0.5]]), torch.tensor([[2.0]])],
    )
    loss_real, loss_generated = vits.discriminator_loss(real, generated)
    assert (float(loss_real), float(loss_generated)) == (0.5 + 4.0, 0.25 + 4.0)
    assert float(vits.generator_loss(generated)) == 0.25 + 1.0


def test_feature_loss_by_hand():
    real = [[torch.tensor([1.0, 3.0]), torch.tensor([0.0])], [torch.tensor([2.0])]]
    generated = [[torch.tensor([2.0, 3.0]), torch.tensor([4.0])], [torch.tensor([2.5])]]
    for x in (*real[0], *generated[0]):
        x.requires_grad_()
    loss = vits.feature_loss(real, generated)
    assert float(loss.detach()) == 2 * (0.5 + 4.0 + 0.5)
    loss.backward()
    assert real[0][0].grad is None
    assert torch.equal(generated[0][0].grad, torch.tensor([1.0, 0.0]))


def test_kl_loss_is_the_divergence_on_average():
    torch.manual_seed(0)
    m_q, m_p, logs_q, logs_p = (0.5 * torch.randn(1, 3, 2) for _ in range(4))
    n = 40_000
    z = m_q + torch.randn(n, 3, 2) * logs_q.exp()
    # one long sequence of n samples: the loss is their mean for each frame
    row = [x.permute(1, 0, 2).reshape(1, 3, -1) for x in (z, *(x.expand(n, -1, -1) for x in (logs_q, m_p, logs_p)))]
    found = vits.kl_loss(*row, torch.ones(1, 1, 2 * n))
    expected = kl_divergence(Normal(m_q, logs_q.exp()), Normal(m_p, logs_p.exp())).sum(1).mean()
    # the spread of one sample's value is about 2: 2 / sqrt(80,000) = 0.007 for the mean
    assert float(found) == pytest.approx(float(expected), abs=0.035)


def test_kl_loss_counts_each_frame_once():
    z, logs_q, m_p, logs_p = (torch.randn(2, 3, 4) for _ in range(4))
    is_in = vits.sequence_mask(torch.tensor([4, 1]), 4)
    single = logs_p - logs_q - 0.5 + (z - m_p) ** 2 / (2 * torch.exp(logs_p) ** 2)
    expected = (single[0].sum() + single[1, :, 0].sum()) / 5
    torch.testing.assert_close(vits.kl_loss(z, logs_q, m_p, logs_p, is_in), expected)
