"""VITS: from text to a waveform with one network (Kim, Kong, Son 2021, arXiv:2106.06103).

Everything that the model needs is here, top to bottom: config, pure functions, layers, losses, model, data. Copy it,
rename it, change it. Names of layers are the authors', so that their checkpoints load (``Vits.load_pretrained``).

    python recipes/ljspeech/train_vits.py

Training: the posterior encoder ``enc_q`` turns the linear spectrogram into latents z, the decoder ``dec`` turns random
segments of z into waveforms, which the discriminators ``disc`` judge. The flow maps z to z_p, whose prior the text
encoder ``enc_p`` gives for each token; the alignment of tokens and frames is the most likely monotonic one under that
prior, and teaches the duration predictor ``dp``. Inference runs the prior, its durations and the flow backwards.

Deviations from the authors' code, none of which changes names or numbers of parameters:
- Weight norm by torch.nn.utils.parametrizations; convolutions of the decoder keep torch's initialisation (the authors'
  N(0, 0.01) is overwritten by their weight norm before its first use).
- The stochastic duration predictor, the losses and all spectrograms are computed in fp32, whatever autocast says.
- The alignment search is plain torch, on the device. The real half of the discriminators' features takes no gradient.
- A token lasts at most ``max_token_frames`` at inference: a guard against a duration predictor not yet trained.

Shapes: B batch, T text tokens, F spectrogram frames, S audio samples, C channels, H heads, D channels of a head,
R relative positions, G channels of the speaker embedding, N linear frequencies, M mel channels, K spline bins.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from trainer import ConfigError, TrainerConfig, TrainerModel, field
from trainer.checkpoint import load_weights
from trainer.data.audio import write_audio
from trainer.data.loader import build_loader
from trainer.data.phonemes import phonemes_available
from trainer.data.speech import DataError, SpeechDataset
from trainer.data.text import SYMBOLS, Tokenizer
from trainer.loggers.figures import plot_alignment, plot_spectrogram

SLOPE = 0.1  # of all leaky ReLUs but the decoder's last, which has torch's 0.01
FORWARD = "_vits_forward"  # where the discriminator's pass leaves the generator's outputs for the generator's pass

TEST_SENTENCES = [
    "The train to the coast leaves at ten past seven.",
    "She read the letter twice, then folded it and said nothing.",
    "How many of these old stone bridges are still in use?",
    "It rained all night, and by morning the river had risen over the lower fields.",
]


# ---- config ----


@dataclass
class VitsConfig(TrainerConfig):
    """What can be set, with the paper's values for LJSpeech; ``--coqpit.hidden_channels=96`` on the command line."""

    # text
    num_symbols: int = field(len(SYMBOLS), "Symbols of the text, the blank included.", min=1)
    phonemes: bool | None = field(None, "Read phonemes (true), letters (false), phonemes if installed (none).")
    add_blank: bool = field(True, "Put a blank between all symbols and at both ends.")

    # audio
    sample_rate: int = field(22050, "Rate of the waveforms.", unit="Hz", min=1)
    filter_length: int = field(1024, "Size of the Fourier transform.", unit="samples", min=2)
    hop_length: int = field(256, "Samples in a frame; the product of upsample_rates.", unit="samples", min=1)
    win_length: int = field(1024, "Length of the Hann window.", unit="samples", min=1)
    n_mel_channels: int = field(80, "Channels of the mel spectrograms that are compared.", min=1)
    mel_fmin: float = field(0.0, "Lowest frequency of the mel channels.", unit="Hz", min=0)
    mel_fmax: float | None = field(None, "Highest frequency of the mel channels; none is half the sample rate.", min=0)
    segment_size: int = field(8192, "Samples of the random segments that are decoded in training.", unit="samples")

    # generator
    inter_channels: int = field(192, "Channels of the latents z; even.", min=2)
    hidden_channels: int = field(192, "Channels inside the encoders, the flow and the duration predictor.", min=1)
    filter_channels: int = field(768, "Channels inside the text encoder's feed-forward layers.", min=1)
    n_heads: int = field(2, "Heads of the text encoder's attention; divides hidden_channels.", min=1)
    n_layers: int = field(6, "Layers of the text encoder.", min=1)
    kernel_size: int = field(3, "Kernel of the text encoder's feed-forward layers.", min=1)
    window_size: int = field(4, "Relative positions further away than this many tokens have no embedding.", min=1)
    p_dropout: float = field(0.1, "Share that the text encoder drops.", min=0, max=1)
    posterior_layers: int = field(16, "WaveNet layers of the posterior encoder.", min=1)
    n_flows: int = field(4, "Coupling layers of the flow.", min=1)
    flow_layers: int = field(4, "WaveNet layers in a coupling layer.", min=1)
    wn_kernel_size: int = field(5, "Kernel of the WaveNet layers; odd.", min=1)
    use_sdp: bool = field(True, "Predict durations stochastically (true) or as one number (false).")
    dp_filter_channels: int = field(256, "Channels of the deterministic duration predictor.", min=1)
    dp_dropout: float = field(0.5, "Share that the duration predictor drops.", min=0, max=1)
    resblock: str = field("1", "The authors' kind of the decoder's residual blocks.", choices=("1", "2"))
    resblock_kernel_sizes: list[int] = field([3, 7, 11], "Kernels of the residual blocks side by side; odd.", min=1)
    resblock_dilation_sizes: list[list[int]] = field(
        [[1, 3, 5], [1, 3, 5], [1, 3, 5]], "Dilations in each of these residual blocks."
    )
    upsample_rates: list[int] = field([8, 8, 2, 2], "Factors by which the decoder's stages upsample.", min=1)
    upsample_kernel_sizes: list[int] = field([16, 16, 4, 4], "Kernels of these stages.", min=1)
    upsample_initial_channel: int = field(512, "Channels before the first stage; every stage halves them.", min=1)
    num_speakers: int = field(1, "Speakers; more than one need gin_channels.", min=1)
    gin_channels: int = field(0, "Channels of the speaker embedding; 0 for one speaker.", min=0)
    speakers: list[str] = field([], "Names of the speakers in the data; the place in this list is the id.")

    # discriminators
    disc_periods: list[int] = field([2, 3, 5, 7, 11], "Periods of the period discriminators.", min=1)
    disc_period_channels: list[int] = field([32, 128, 512, 1024, 1024], "Their channels, layer by layer.", min=1)
    disc_scale_channels: list[int] = field(
        [16, 64, 256, 1024, 1024, 1024], "Channels of the scale discriminator, layer by layer.", min=1
    )

    # losses and optimization
    c_mel: float = field(45.0, "Weight of the mel loss.", min=0)
    c_kl: float = field(1.0, "Weight of the KL loss.", min=0)
    lr: float | list[float] = field(2e-4, "Learning rate; a list gives discriminator's and generator's.", min=0)
    betas: list[float] = field([0.8, 0.99], "AdamW's betas.", min=0, max=1)
    eps: float = field(1e-9, "AdamW's epsilon.", min=0)
    lr_decay: float = field(0.999875, "Factor of the learning rate after each epoch.", min=0, max=1)
    batch_size: int = field(64, "Samples in a training batch.", unit="samples", min=1)
    epochs: int = field(20000, "Epochs to train.", min=1)
    run_name: str = field("vits", "First part of the name of the run's folder.")
    target_loss: str | None = field("loss_mel", "Loss that decides which model is best.")

    # data
    dataset_path: str = field("", "Folder of the data set; when empty, the recipe says where it looks.")
    min_seconds: float = field(0.0, "Shorter clips are left out.", unit="s", min=0)
    max_seconds: float | None = field(None, "Longer clips are left out.", unit="s", min=0)
    max_tokens: int | None = field(None, "Samples with more tokens are left out.", min=1)
    cache_dir: str | None = field(None, "Folder of the decoded audio; none is the user's cache folder.")

    # inference
    max_token_frames: int = field(200, "Longest that a token may be spoken, before length_scale.", unit="frames", min=1)
    test_sentences: list[str] = field(TEST_SENTENCES, "What is spoken after every epoch.")

    def check_values(self) -> None:
        """Raise a ConfigError that lists every value that does not go with the others."""
        problems = [*_audio_problems(self), *_decoder_problems(self), *_model_problems(self)]
        if problems:
            raise ConfigError(problems, type(self).__name__)


def _audio_problems(c: VitsConfig) -> Iterable[str]:
    if c.win_length > c.filter_length:
        yield f"win_length={c.win_length}: must be at most filter_length={c.filter_length}"
    if c.hop_length > c.filter_length or (c.filter_length - c.hop_length) % 2:
        yield f"hop_length={c.hop_length}: filter_length={c.filter_length} less it must be even, not below 0"
    if c.segment_size % c.hop_length or c.segment_size <= c.filter_length:
        yield (
            f"segment_size={c.segment_size}: must be a multiple of hop_length={c.hop_length} above "
            f"filter_length={c.filter_length}"
        )
    highest = c.sample_rate / 2 if c.mel_fmax is None else c.mel_fmax
    if not c.mel_fmin < highest <= c.sample_rate / 2:
        yield (
            f"mel_fmin={c.mel_fmin}, mel_fmax={c.mel_fmax}: must rise, up to sample_rate / 2 = {c.sample_rate / 2:g} Hz"
        )


def _decoder_problems(c: VitsConfig) -> Iterable[str]:
    if math.prod(c.upsample_rates) != c.hop_length:
        yield f"upsample_rates={c.upsample_rates}: their product must be hop_length={c.hop_length}"
    if len(c.upsample_kernel_sizes) != len(c.upsample_rates):
        yield f"upsample_kernel_sizes={c.upsample_kernel_sizes}: must be as many as upsample_rates={c.upsample_rates}"
    for rate, kernel in zip(c.upsample_rates, c.upsample_kernel_sizes):
        if kernel < rate or (kernel - rate) % 2:
            yield f"upsample_kernel_sizes={c.upsample_kernel_sizes}: {kernel} less rate {rate} must be even, not < 0"
    smallest = 2 ** len(c.upsample_rates)
    if c.upsample_initial_channel % smallest:
        yield (
            f"upsample_initial_channel={c.upsample_initial_channel}: must be a multiple of {smallest}, "
            f"for {len(c.upsample_rates)} stages that halve it"
        )
    if len(c.resblock_dilation_sizes) != len(c.resblock_kernel_sizes):
        yield f"resblock_dilation_sizes={c.resblock_dilation_sizes}: one list is needed for each resblock_kernel_sizes"
    if not c.resblock_kernel_sizes or any(kernel % 2 == 0 for kernel in c.resblock_kernel_sizes):
        yield f"resblock_kernel_sizes={c.resblock_kernel_sizes}: must be odd numbers"
    if any(not dilations or min(dilations) < 1 for dilations in c.resblock_dilation_sizes):
        yield f"resblock_dilation_sizes={c.resblock_dilation_sizes}: must be lists of numbers of at least 1"


def _model_problems(c: VitsConfig) -> Iterable[str]:
    if c.hidden_channels % c.n_heads:
        yield f"n_heads={c.n_heads}: must divide hidden_channels={c.hidden_channels}"
    if c.inter_channels % 2:
        yield f"inter_channels={c.inter_channels}: must be even, the flow couples halves"
    if c.wn_kernel_size % 2 == 0:
        yield f"wn_kernel_size={c.wn_kernel_size}: must be odd"
    if (c.num_speakers > 1) != (c.gin_channels > 0):
        yield (
            f"gin_channels={c.gin_channels} with num_speakers={c.num_speakers}: several speakers need gin_channels "
            "(the authors take 256), one speaker needs 0"
        )
    if c.speakers and len(c.speakers) != c.num_speakers:
        yield f"num_speakers={c.num_speakers}: speakers has {len(c.speakers)} names"
    if len(c.betas) != 2:
        yield f"betas={c.betas}: must be two numbers"
    if isinstance(c.lr, list) and len(c.lr) != 2:
        yield f"lr={c.lr}: must be one number, or the discriminator's and the generator's"
    for name in ("disc_periods", "disc_period_channels", "disc_scale_channels"):
        if not getattr(c, name):
            yield f"{name}=[]: at least one number is needed"
    if max(c.disc_periods, default=0) >= c.segment_size:
        yield f"disc_periods={c.disc_periods}: must be below segment_size={c.segment_size}"


# ---- pure functions: masks, spectrograms, segments ----


def sequence_mask(lengths_B: torch.Tensor, size: int) -> torch.Tensor:
    """1 where a position is inside its sequence, else 0: float [B, 1, size]."""
    positions = torch.arange(size, device=lengths_B.device)
    return (positions < lengths_B.unsqueeze(1)).unsqueeze(1).float()


def mirror(x_BCS: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """Pads the last dimension with mirror images. F.pad's "reflect" does too, but its gradient varies on GPUs."""
    S = x_BCS.size(-1)
    if max(left, right) >= S:
        raise ValueError(f"{S} samples cannot be mirrored for {max(left, right)} of padding: give a longer waveform")
    return torch.cat([x_BCS[..., 1 : left + 1].flip(-1), x_BCS, x_BCS[..., S - 1 - right : S - 1].flip(-1)], dim=-1)


def reflect_pad(wave_BS: torch.Tensor, lengths_B: torch.Tensor, pad: int) -> torch.Tensor:
    """Each waveform with ``pad`` samples mirrored at its own two ends, wherever the batch's padding begins.

    Returns:
        [B, S + 2 * pad]; what lies behind a waveform's second mirror is of no meaning.
    """
    position_S = torch.arange(-pad, wave_BS.size(1) + pad, device=wave_BS.device).abs()
    last_B1 = lengths_B.unsqueeze(1) - 1
    index_BS = torch.minimum(position_S, 2 * last_B1 - position_S).clamp_min(0)
    return wave_BS.gather(1, index_BS)


def linear_spectrogram(
    wave_BS: torch.Tensor,
    filter_length: int,
    hop_length: int,
    win_length: int,
    lengths_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Magnitudes sqrt(re^2 + im^2 + 1e-6) of the short-time Fourier transform, in fp32.

    Args:
        wave_BS: waveforms in [-1, 1].
        filter_length: size of the transform, in samples.
        hop_length: samples between frames.
        win_length: of the Hann window, in samples.
        lengths_B: samples of each waveform, to mirror each at its own end; none when all are equally long.

    Returns:
        [B, N, F] with F = S // hop_length frames; frames behind a waveform's own length // hop_length are 0.
    """
    pad = (filter_length - hop_length) // 2
    with torch.autocast(wave_BS.device.type, enabled=False):
        wave_BS = wave_BS.float()
        padded_BS = mirror(wave_BS, pad, pad) if lengths_B is None else reflect_pad(wave_BS, lengths_B, pad)
        margin = filter_length - win_length
        window = F.pad(torch.hann_window(win_length, device=wave_BS.device), (margin // 2, margin - margin // 2))
        # not torch.stft: its gradient varies on GPUs, by the order of additions
        spectrum_BNF = torch.fft.rfft(padded_BS.unfold(1, filter_length, hop_length) * window).mT
        magnitude_BNF = torch.sqrt(spectrum_BNF.real.square() + spectrum_BNF.imag.square() + 1e-6)
    if lengths_B is None:
        return magnitude_BNF
    return magnitude_BNF * sequence_mask(lengths_B // hop_length, magnitude_BNF.size(2))


def mel_filterbank(
    sample_rate: int, filter_length: int, n_mels: int, fmin: float = 0.0, fmax: float | None = None
) -> torch.Tensor:
    """Slaney's triangular mel filters with area normalisation (Auditory Toolbox, 1998), as librosa has them.

    The scale is linear up to 1000 Hz (3 mel for 200 Hz), then logarithmic (27 mel for a factor of 6.4).

    Returns:
        float32 [M, N] with N = filter_length // 2 + 1.
    """
    step, knee_hz, log_step = 200 / 3, 1000.0, math.log(6.4) / 27

    def to_mel(hz: float) -> float:
        return hz / step if hz < knee_hz else knee_hz / step + math.log(hz / knee_hz) / log_step

    top = sample_rate / 2 if fmax is None else fmax
    mels = torch.linspace(to_mel(fmin), to_mel(top), n_mels + 2, dtype=torch.float64)
    knee = knee_hz / step
    edges = torch.where(mels < knee, mels * step, knee_hz * torch.exp((mels - knee).clamp_min(0) * log_step))
    bins_N = torch.linspace(0, sample_rate / 2, filter_length // 2 + 1, dtype=torch.float64)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles_MN = torch.minimum((bins_N - low) / (centre - low), (high - bins_N) / (high - centre)).clamp_min(0)
    return (triangles_MN * 2 / (high - low)).float()


def log_mel(linear_BNF: torch.Tensor, filters_MN: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of the mel spectrogram [B, M, F], clamped at 1e-5, in fp32."""
    with torch.autocast(linear_BNF.device.type, enabled=False):
        return torch.log((filters_MN @ linear_BNF.float()).clamp_min(1e-5))


def random_starts(lengths_B: torch.Tensor, size: int) -> torch.Tensor:
    """Where a random segment of ``size`` begins in each sequence: int64 [B], so that it fits (0 if nothing fits)."""
    room_B = (lengths_B - size + 1).clamp_min(1)
    return (torch.rand(lengths_B.shape, device=lengths_B.device) * room_B).long()


def slice_segments(x_BCF: torch.Tensor, starts_B: torch.Tensor, size: int) -> torch.Tensor:
    """``size`` consecutive positions of each sequence, from its start on: [B, C, size].

    Raises:
        ValueError: the padded batch is shorter than a segment.
    """
    if x_BCF.size(2) < size:
        raise ValueError(
            f"a segment of {size} does not fit into a batch padded to {x_BCF.size(2)}: leave out clips that are "
            "shorter than segment_size"
        )
    index_BF = starts_B.unsqueeze(1) + torch.arange(size, device=x_BCF.device)
    return x_BCF.gather(2, index_BF.unsqueeze(1).expand(-1, x_BCF.size(1), -1))


# ---- pure functions: alignment ----


@torch.no_grad()
def search_alignment(
    score_BFT: torch.Tensor, frame_lengths_B: torch.Tensor, token_lengths_B: torch.Tensor
) -> torch.Tensor:
    """The monotonic alignment with the highest sum of scores (section 2.2.1 and appendix A, algorithm 1).

    Every frame speaks one token, beginning with the first and ending with the last, and none is left out. Of equally
    good ways the one that stays longer on the later token is taken, as the authors' search does. Runs on the device of
    its inputs, without waiting for it; a sequence needs at least as many frames as tokens.

    Args:
        score_BFT: log-likelihood of each frame under each token; padding may hold anything finite.
        frame_lengths_B: frames of each sequence.
        token_lengths_B: tokens of each sequence.

    Returns:
        float [B, F, T]: 1 where the frame speaks the token, else 0.
    """
    B, frames, tokens = score_BFT.shape
    score_FBT = score_BFT.float().transpose(0, 1).contiguous()
    # best[f][:, t + 1] is the best sum of a way that is at token t in frame f - 1; column 0 is only a way's beginning.
    best = score_FBT.new_full((frames + 1, B, tokens + 1), -torch.inf)
    best[0, :, 0] = 0
    stay, move = best[:, :, 1:].unbind(0), best[:, :, :-1].unbind(0)
    for f, score_BT in enumerate(score_FBT.unbind(0)):
        torch.maximum(stay[f], move[f], out=stay[f + 1]).add_(score_BT)
    is_in_FB = torch.arange(frames, device=score_BFT.device).unsqueeze(1) < frame_lengths_B
    # 1 where the way to (f, t) came from token t - 1
    moved_FBT = ((best[:-1, :, :-1] > best[:-1, :, 1:]) & is_in_FB.unsqueeze(2)).to(torch.uint8)
    token_B1 = (token_lengths_B - 1).unsqueeze(1)
    way = []
    for moved_BT in reversed(moved_FBT.unbind(0)):
        way.append(token_B1)
        token_B1 = token_B1 - moved_BT.gather(1, token_B1)
    way_BF = torch.cat(way[::-1], dim=1)
    path_BFT = way_BF.unsqueeze(2) == torch.arange(tokens, device=score_BFT.device)
    return (path_BFT & is_in_FB.T.unsqueeze(2)).float()


def path_of_durations(durations_BT: torch.Tensor, frames: int) -> torch.Tensor:
    """The alignment, float [B, F, T], in which each token lasts the given number of frames."""
    ends_BT = durations_BT.cumsum(1)
    position_F1 = torch.arange(frames, device=durations_BT.device).unsqueeze(1)
    ends_B1T = ends_BT.unsqueeze(1)
    starts_B1T = ends_B1T - durations_BT.unsqueeze(1)
    return ((position_F1 >= starts_B1T) & (position_F1 < ends_B1T)).float()


def prior_scores(z_p_BCF: torch.Tensor, m_p_BCT: torch.Tensor, logs_p_BCT: torch.Tensor) -> torch.Tensor:
    """Log-likelihood [B, F, T] of each frame of z_p under each token's normal distribution N(m_p, exp(logs_p)^2)."""
    with torch.autocast(z_p_BCF.device.type, enabled=False):
        z_BFC = z_p_BCF.float().transpose(1, 2)
        m_BCT, logs_BCT = m_p_BCT.float(), logs_p_BCT.float()
        precision_BCT = torch.exp(-2 * logs_BCT)
        constant_B1T = (-0.5 * math.log(2 * math.pi) - logs_BCT - 0.5 * m_BCT.square() * precision_BCT).sum(
            1, keepdim=True
        )
        return constant_B1T - 0.5 * z_BFC.square() @ precision_BCT + z_BFC @ (m_BCT * precision_BCT)


# ---- pure functions: rational-quadratic spline ----

MIN_BIN, MIN_SLOPE = 1e-3, 1e-3


def _bin_edges(logits: torch.Tensor, bound: float) -> torch.Tensor:
    """Edges [..., K + 1] of K bins that fill [-bound, bound], each with at least MIN_BIN of it."""
    bins = logits.size(-1)
    sizes = MIN_BIN + (1 - MIN_BIN * bins) * logits.softmax(-1)
    inner = 2 * bound * sizes.cumsum(-1)[..., :-1] - bound
    return F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)


def rational_quadratic_spline(
    x: torch.Tensor,
    width_logits: torch.Tensor,
    height_logits: torch.Tensor,
    slope_logits: torch.Tensor,
    bound: float,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A monotonic spline on [-bound, bound], the identity outside (Durkan et al. 2019, arXiv:1906.04032, eq. 4 to 8).

    Args:
        x: values [...].
        width_logits: of the bins, [..., K], before the softmax.
        height_logits: of the bins, [..., K], before the softmax.
        slope_logits: [..., K - 1], slopes at the inner knots before the softplus; at the outer ones they are 1.
        bound: half the width of the interval.
        inverse: compute the inverse function.

    Returns:
        values [...] and the logarithm of the derivative [...] of the function computed.
    """
    inside = x.abs() <= bound
    u = x.clamp(-bound, bound)  # outside, the spline is computed for nothing, but without a branch
    edge_x, edge_y = _bin_edges(width_logits, bound), _bin_edges(height_logits, bound)
    slopes = F.pad(slope_logits, (1, 1), value=math.log(math.expm1(1 - MIN_SLOPE)))
    slopes = MIN_SLOPE + F.softplus(slopes)
    knots = edge_y if inverse else edge_x
    k = (u.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, k).squeeze(-1)

    x0, y0 = pick(edge_x), pick(edge_y)
    w, h = pick(edge_x[..., 1:]) - x0, pick(edge_y[..., 1:]) - y0
    d0, d1 = pick(slopes), pick(slopes[..., 1:])
    s = h / w
    curve = d0 + d1 - 2 * s
    if inverse:
        rise = u - y0
        a, b, c = h * (s - d0) + rise * curve, h * d0 - rise * curve, -s * rise
        xi = 2 * c / (-b - torch.sqrt((b * b - 4 * a * c).clamp_min(0)))
    else:
        xi = (u - x0) / w
    xi_rest = xi * (1 - xi)
    denominator = s + curve * xi_rest
    log_slope = torch.log(s * s * (d1 * xi * xi + 2 * s * xi_rest + d0 * (1 - xi) ** 2)) - 2 * torch.log(denominator)
    if inverse:
        y, log_slope = xi * w + x0, -log_slope
    else:
        y = y0 + h * (s * xi * xi + d0 * xi_rest) / denominator
    return torch.where(inside, y, x), torch.where(inside, log_slope, torch.zeros_like(x))


# ---- layers of the text encoder ----


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of [B, C, T]."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x_BCT.mT, self.gamma.shape, self.gamma, self.beta, self.eps).mT


def band_to_square(x_BHTR: torch.Tensor) -> torch.Tensor:
    """From [.., T, R], where R counts relative positions -w to w, to [.., T, T] by position; 0 outside the window."""
    *batch, T, R = x_BHTR.shape
    # Rows of width T + R read as rows of width T + R - 1 shift row i by i.
    flat = F.pad(x_BHTR, (0, T)).flatten(-2)[..., : T * (T + R - 1)]
    return flat.view(*batch, T, T + R - 1)[..., R // 2 : R // 2 + T]


def square_to_band(x_BHTT: torch.Tensor, R: int) -> torch.Tensor:
    """The inverse of band_to_square: the R middle diagonals of [.., T, T] as [.., T, R]; 0 outside the sequence."""
    *batch, T, _ = x_BHTT.shape
    flat = F.pad(F.pad(x_BHTT, (R // 2, R // 2)).flatten(-2), (0, T))
    return flat.view(*batch, T, T + R)[..., :R]


class MultiHeadAttention(nn.Module):
    """Self-attention with embeddings of the relative positions up to ``window_size`` (Shaw et al., arXiv:1803.02155).

    The embeddings are shared by the heads. Maps x [B, C, T] with a mask [B, 1, T] to [B, C, T].
    """

    def __init__(self, channels: int, n_heads: int, window_size: int, p_dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.conv_q = nn.Conv1d(channels, channels, 1)
        self.conv_k = nn.Conv1d(channels, channels, 1)
        self.conv_v = nn.Conv1d(channels, channels, 1)
        self.conv_o = nn.Conv1d(channels, channels, 1)
        self.drop = nn.Dropout(p_dropout)
        head = channels // n_heads
        self.emb_rel_k = nn.Parameter(torch.randn(1, 2 * window_size + 1, head) * head**-0.5)
        self.emb_rel_v = nn.Parameter(torch.randn(1, 2 * window_size + 1, head) * head**-0.5)
        for conv in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.xavier_uniform_(conv.weight)

    def _split(self, x_BCT: torch.Tensor) -> torch.Tensor:
        return x_BCT.unflatten(1, (self.n_heads, -1)).mT  # [B, H, T, D]

    def forward(self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor) -> torch.Tensor:
        q_BHTD = self._split(self.conv_q(x_BCT))
        k_BHTD, v_BHTD = self._split(self.conv_k(x_BCT)), self._split(self.conv_v(x_BCT))
        q_BHTD = q_BHTD / math.sqrt(q_BHTD.size(-1))
        scores_BHTT = q_BHTD @ k_BHTD.mT + band_to_square(q_BHTD @ self.emb_rel_k.mT)
        # fp32: the mask's -1e4 must be far below every score; a softmax in fp16 would lose small weights
        scores_BHTT = scores_BHTT.float().masked_fill(mask_B1T.unsqueeze(2) == 0, -1e4)
        p_BHTT = self.drop(scores_BHTT.softmax(-1))
        y_BHTD = p_BHTT @ v_BHTD.to(p_BHTT.dtype)
        y_BHTD = y_BHTD + square_to_band(p_BHTT, self.emb_rel_v.size(1)) @ self.emb_rel_v
        return self.conv_o(y_BHTD.mT.flatten(1, 2))


class FFN(nn.Module):
    """Two convolutions over time with a ReLU between them: [B, C, T] to [B, C, T]."""

    def __init__(self, channels: int, filter_channels: int, kernel_size: int, p_dropout: float = 0.0) -> None:
        super().__init__()
        self.pad = ((kernel_size - 1) // 2, kernel_size // 2)
        self.conv_1 = nn.Conv1d(channels, filter_channels, kernel_size)
        self.conv_2 = nn.Conv1d(filter_channels, channels, kernel_size)
        self.drop = nn.Dropout(p_dropout)

    def forward(self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor) -> torch.Tensor:
        h_BCT = self.drop(self.conv_1(F.pad(x_BCT * mask_B1T, self.pad)).relu())
        return self.conv_2(F.pad(h_BCT * mask_B1T, self.pad)) * mask_B1T


class Encoder(nn.Module):
    """Transformer encoder with the normalisation after each sum: [B, C, T] to [B, C, T]."""

    def __init__(self, config: VitsConfig) -> None:
        super().__init__()
        c, layers = config.hidden_channels, range(config.n_layers)
        self.drop = nn.Dropout(config.p_dropout)
        self.attn_layers = nn.ModuleList(
            MultiHeadAttention(c, config.n_heads, config.window_size, config.p_dropout) for _ in layers
        )
        self.norm_layers_1 = nn.ModuleList(LayerNorm(c) for _ in layers)
        self.ffn_layers = nn.ModuleList(
            FFN(c, config.filter_channels, config.kernel_size, config.p_dropout) for _ in layers
        )
        self.norm_layers_2 = nn.ModuleList(LayerNorm(c) for _ in layers)

    def forward(self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor) -> torch.Tensor:
        x_BCT = x_BCT * mask_B1T
        for attend, norm_1, feed, norm_2 in zip(
            self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2
        ):
            x_BCT = norm_1(x_BCT + self.drop(attend(x_BCT, mask_B1T)))
            x_BCT = norm_2(x_BCT + self.drop(feed(x_BCT, mask_B1T)))
        return x_BCT * mask_B1T


class TextEncoder(nn.Module):
    """Tokens to hidden states and the prior of each token (section 2.1.2).

    Maps tokens [B, T] with a mask [B, 1, T] to hidden states [B, hidden, T], and m_p and logs_p [B, inter, T] in fp32.
    """

    def __init__(self, config: VitsConfig) -> None:
        super().__init__()
        c = config.hidden_channels
        self.emb = nn.Embedding(config.num_symbols, c)
        nn.init.normal_(self.emb.weight, 0.0, c**-0.5)
        self.encoder = Encoder(config)
        self.proj = nn.Conv1d(c, 2 * config.inter_channels, 1)

    def forward(
        self, tokens_BT: torch.Tensor, mask_B1T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_BCT = self.emb(tokens_BT).mT * math.sqrt(self.emb.embedding_dim)
        x_BCT = self.encoder(x_BCT, mask_B1T)
        m_p_BCT, logs_p_BCT = (self.proj(x_BCT) * mask_B1T).float().chunk(2, dim=1)
        return x_BCT, m_p_BCT, logs_p_BCT


# ---- layers of the posterior encoder and the flow ----


class WN(nn.Module):
    """Gated convolutions with skip connections, as in WaveNet: [B, C, F] to [B, C, F]; g [B, G, 1] conditions all."""

    def __init__(self, channels: int, kernel_size: int, n_layers: int, gin_channels: int = 0) -> None:
        super().__init__()
        self.channels = channels
        if gin_channels:
            self.cond_layer = weight_norm(nn.Conv1d(gin_channels, 2 * channels * n_layers, 1))
        pad = kernel_size // 2
        self.in_layers = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, 2 * channels, kernel_size, padding=pad)) for _ in range(n_layers)
        )
        # the last layer has no successor: only its skip connection is computed
        widths = [2 * channels] * (n_layers - 1) + [channels]
        self.res_skip_layers = nn.ModuleList(weight_norm(nn.Conv1d(channels, width, 1)) for width in widths)

    def forward(self, x_BCF: torch.Tensor, mask_B1F: torch.Tensor, g_BG1: torch.Tensor | None = None) -> torch.Tensor:
        c, last = self.channels, len(self.in_layers) - 1
        conditions = None if g_BG1 is None else self.cond_layer(g_BG1).chunk(last + 1, dim=1)
        skip_BCF = torch.zeros_like(x_BCF)
        for i, (conv, res_skip) in enumerate(zip(self.in_layers, self.res_skip_layers)):
            h = conv(x_BCF) if conditions is None else conv(x_BCF) + conditions[i]  # [B, 2C, F]
            h = res_skip(torch.tanh(h[:, :c]) * torch.sigmoid(h[:, c:]))
            if i < last:
                x_BCF = (x_BCF + h[:, :c]) * mask_B1F
                h = h[:, c:]
            skip_BCF = skip_BCF + h
        return skip_BCF * mask_B1F


class PosteriorEncoder(nn.Module):
    """Linear spectrogram [B, N, F] to a sample z of the posterior, m_q and logs_q, all [B, inter, F] in fp32."""

    def __init__(self, config: VitsConfig) -> None:
        super().__init__()
        c = config.hidden_channels
        self.pre = nn.Conv1d(config.filter_length // 2 + 1, c, 1)
        self.enc = WN(c, config.wn_kernel_size, config.posterior_layers, config.gin_channels)
        self.proj = nn.Conv1d(c, 2 * config.inter_channels, 1)

    def forward(
        self, linear_BNF: torch.Tensor, mask_B1F: torch.Tensor, g_BG1: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h_BCF = self.enc(self.pre(linear_BNF) * mask_B1F, mask_B1F, g_BG1)
        m_q_BCF, logs_q_BCF = (self.proj(h_BCF) * mask_B1F).float().chunk(2, dim=1)
        z_BCF = (m_q_BCF + torch.randn_like(m_q_BCF) * torch.exp(logs_q_BCF)) * mask_B1F
        return z_BCF, m_q_BCF, logs_q_BCF


class Flip(nn.Module):
    """Reverses the order of the channels of [B, C, F], so that the next coupling changes the other half."""

    def forward(
        self, x_BCF: torch.Tensor, mask_B1F: torch.Tensor, g_BG1: torch.Tensor | None = None, reverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x_BCF.flip(1), x_BCF.new_zeros(x_BCF.size(0))


class ResidualCouplingLayer(nn.Module):
    """Shifts the second half of the channels by a function of the first: [B, C, F] to [B, C, F], log-determinant [B].

    The scale is 1, so the log-determinant is 0 (section 2.1.2).
    """

    def __init__(
        self, channels: int, hidden_channels: int, kernel_size: int, n_layers: int, gin_channels: int = 0
    ) -> None:
        super().__init__()
        self.pre = nn.Conv1d(channels // 2, hidden_channels, 1)
        self.enc = WN(hidden_channels, kernel_size, n_layers, gin_channels)
        self.post = nn.Conv1d(hidden_channels, channels // 2, 1)
        nn.init.zeros_(self.post.weight)
        nn.init.zeros_(self.post.bias)

    def forward(
        self, x_BCF: torch.Tensor, mask_B1F: torch.Tensor, g_BG1: torch.Tensor | None = None, reverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x0, x1 = x_BCF.chunk(2, dim=1)
        m = self.post(self.enc(self.pre(x0) * mask_B1F, mask_B1F, g_BG1)).float() * mask_B1F
        x1 = (x1 - m if reverse else x1 + m) * mask_B1F
        return torch.cat([x0, x1], dim=1), x1.new_zeros(x1.size(0))


class ResidualCouplingBlock(nn.Module):
    """The flow between posterior latents z and prior latents z_p: [B, inter, F] to [B, inter, F], in fp32."""

    def __init__(self, config: VitsConfig) -> None:
        super().__init__()
        c = config
        self.flows = nn.ModuleList()
        for _ in range(c.n_flows):
            coupling = ResidualCouplingLayer(
                c.inter_channels, c.hidden_channels, c.wn_kernel_size, c.flow_layers, c.gin_channels
            )
            self.flows.extend([coupling, Flip()])

    def forward(
        self, x_BCF: torch.Tensor, mask_B1F: torch.Tensor, g_BG1: torch.Tensor | None = None, reverse: bool = False
    ) -> torch.Tensor:
        for flow in reversed(self.flows) if reverse else self.flows:
            x_BCF, _ = flow(x_BCF, mask_B1F, g_BG1, reverse=reverse)
        return x_BCF


# ---- layers of the duration predictors ----


class ElementwiseAffine(nn.Module):
    """Scales and shifts each channel: [B, C, T] to [B, C, T] and the log-determinant [B]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(channels, 1))
        self.logs = nn.Parameter(torch.zeros(channels, 1))

    def forward(
        self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor, g_BCT: torch.Tensor | None = None, reverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_det_B = (self.logs * mask_B1T).sum((1, 2))
        if reverse:
            return (x_BCT - self.m) * torch.exp(-self.logs) * mask_B1T, -log_det_B
        return (self.m + torch.exp(self.logs) * x_BCT) * mask_B1T, log_det_B


class DDSConv(nn.Module):
    """Dilated and depth-separable convolutions with residual connections (section 2.2.2): [B, C, T] to [B, C, T]."""

    def __init__(self, channels: int, kernel_size: int, n_layers: int, p_dropout: float = 0.0) -> None:
        super().__init__()
        dilations = [kernel_size**i for i in range(n_layers)]
        self.drop = nn.Dropout(p_dropout)
        self.convs_sep = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel_size, groups=channels, dilation=d, padding=d * (kernel_size // 2))
            for d in dilations
        )
        self.convs_1x1 = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in dilations)
        self.norms_1 = nn.ModuleList(LayerNorm(channels) for _ in dilations)
        self.norms_2 = nn.ModuleList(LayerNorm(channels) for _ in dilations)

    def forward(self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor, g_BCT: torch.Tensor | None = None) -> torch.Tensor:
        if g_BCT is not None:
            x_BCT = x_BCT + g_BCT
        for sep, norm_1, conv, norm_2 in zip(self.convs_sep, self.norms_1, self.convs_1x1, self.norms_2):
            h_BCT = F.gelu(norm_1(sep(x_BCT * mask_B1T)))
            x_BCT = x_BCT + self.drop(F.gelu(norm_2(conv(h_BCT))))
        return x_BCT * mask_B1T


class ConvFlow(nn.Module):
    """A spline coupling on two channels (neural spline flow): [B, 2, T] to [B, 2, T] and the log-determinant [B]."""

    def __init__(self, filter_channels: int, kernel_size: int, n_layers: int, bins: int = 10, bound: float = 5.0):
        super().__init__()
        self.bins, self.bound = bins, bound
        self.pre = nn.Conv1d(1, filter_channels, 1)
        self.convs = DDSConv(filter_channels, kernel_size, n_layers)
        self.proj = nn.Conv1d(filter_channels, 3 * bins - 1, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(
        self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor, g_BCT: torch.Tensor | None = None, reverse: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x0, x1 = x_BCT.chunk(2, dim=1)
        h = self.proj(self.convs(self.pre(x0), mask_B1T, g_BCT)) * mask_B1T
        widths, heights, slopes = h.mT.unsqueeze(1).split([self.bins, self.bins, self.bins - 1], dim=-1)
        scale = math.sqrt(self.pre.out_channels)
        x1, log_slope = rational_quadratic_spline(x1, widths / scale, heights / scale, slopes, self.bound, reverse)
        return torch.cat([x0, x1], dim=1) * mask_B1T, (log_slope * mask_B1T).sum((1, 2))


def _spline_flows(channels: int, kernel_size: int, p_layers: int, n_flows: int) -> nn.ModuleList:
    flows = nn.ModuleList([ElementwiseAffine(2)])
    for _ in range(n_flows):
        flows.extend([ConvFlow(channels, kernel_size, p_layers), Flip()])
    return flows


def _standard_normal_nll(x_BCT: torch.Tensor, mask_B1T: torch.Tensor) -> torch.Tensor:
    """Negative log-density [B] of x under a standard normal distribution."""
    return (0.5 * (math.log(2 * math.pi) + x_BCT.square()) * mask_B1T).sum((1, 2))


class StochasticDurationPredictor(nn.Module):
    """Durations as samples of a flow that text conditions (section 2.2.2); takes no gradient to its inputs; fp32.

    Maps hidden states [B, C, T] with durations [B, 1, T] in frames to the variational bound of -log p(durations) [B];
    ``sample`` draws log-durations [B, 1, T].
    """

    def __init__(
        self, channels: int, p_dropout: float, gin_channels: int = 0, kernel_size: int = 3, n_flows: int = 4
    ) -> None:
        super().__init__()
        self.pre = nn.Conv1d(channels, channels, 1)
        self.convs = DDSConv(channels, kernel_size, 3, p_dropout)
        self.proj = nn.Conv1d(channels, channels, 1)
        self.flows = _spline_flows(channels, kernel_size, 3, n_flows)
        self.post_pre = nn.Conv1d(1, channels, 1)
        self.post_convs = DDSConv(channels, kernel_size, 3, p_dropout)
        self.post_proj = nn.Conv1d(channels, channels, 1)
        self.post_flows = _spline_flows(channels, kernel_size, 3, n_flows)
        if gin_channels:
            self.cond = nn.Conv1d(gin_channels, channels, 1)

    def _condition(self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor, g_BG1: torch.Tensor | None) -> torch.Tensor:
        h_BCT = self.pre(x_BCT.detach().float())
        if g_BG1 is not None:
            h_BCT = h_BCT + self.cond(g_BG1.detach().float())
        return self.proj(self.convs(h_BCT, mask_B1T)) * mask_B1T

    def forward(
        self,
        x_BCT: torch.Tensor,
        mask_B1T: torch.Tensor,
        durations_B1T: torch.Tensor,
        g_BG1: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with torch.autocast(x_BCT.device.type, enabled=False):  # fp32: log-determinants cancel to small differences
            h_BCT = self._condition(x_BCT, mask_B1T, g_BG1)
            # q(u, nu | durations, text): u makes the whole numbers continuous, nu is a second channel to couple with
            d_BCT = self.post_convs(self.post_pre(durations_B1T), mask_B1T)
            d_BCT = h_BCT + self.post_proj(d_BCT) * mask_B1T
            noise_B2T = torch.randn_like(durations_B1T.expand(-1, 2, -1)) * mask_B1T
            z_B2T, log_q_B = noise_B2T, -_standard_normal_nll(noise_B2T, mask_B1T)
            for flow in self.post_flows:
                z_B2T, log_det_B = flow(z_B2T, mask_B1T, d_BCT)
                log_q_B = log_q_B - log_det_B
            u_B1T, nu_B1T = z_B2T.chunk(2, dim=1)
            log_q_B = log_q_B - ((F.logsigmoid(u_B1T) + F.logsigmoid(-u_B1T)) * mask_B1T).sum((1, 2))
            # p(durations - u, nu | text)
            rest_B1T = torch.log((durations_B1T - torch.sigmoid(u_B1T)).clamp_min(1e-5)) * mask_B1T
            z_B2T, log_dets_B = torch.cat([rest_B1T, nu_B1T], dim=1), -rest_B1T.sum((1, 2))
            for flow in self.flows:
                z_B2T, log_det_B = flow(z_B2T, mask_B1T, h_BCT)
                log_dets_B = log_dets_B + log_det_B
            return _standard_normal_nll(z_B2T, mask_B1T) - log_dets_B + log_q_B

    def sample(
        self,
        x_BCT: torch.Tensor,
        mask_B1T: torch.Tensor,
        g_BG1: torch.Tensor | None = None,
        noise_scale: float = 1.0,
    ) -> torch.Tensor:
        """Log-durations [B, 1, T]; a noise_scale of 0 gives the same ones every time."""
        with torch.autocast(x_BCT.device.type, enabled=False):
            h_BCT = self._condition(x_BCT, mask_B1T, g_BG1)
            z_B2T = torch.randn_like(h_BCT[:, :1].expand(-1, 2, -1)) * noise_scale
            # The first spline changes only nu, which is thrown away.
            for flow in [*reversed(self.flows[2:]), self.flows[0]]:
                z_B2T, _ = flow(z_B2T, mask_B1T, h_BCT, reverse=True)
            return z_B2T[:, :1]


class DurationPredictor(nn.Module):
    """Log-durations [B, 1, T] from hidden states [B, C, T], to which it takes no gradient."""

    def __init__(
        self, channels: int, filter_channels: int, p_dropout: float, gin_channels: int = 0, kernel_size: int = 3
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(p_dropout)
        self.conv_1 = nn.Conv1d(channels, filter_channels, kernel_size, padding=kernel_size // 2)
        self.norm_1 = LayerNorm(filter_channels)
        self.conv_2 = nn.Conv1d(filter_channels, filter_channels, kernel_size, padding=kernel_size // 2)
        self.norm_2 = LayerNorm(filter_channels)
        self.proj = nn.Conv1d(filter_channels, 1, 1)
        if gin_channels:
            self.cond = nn.Conv1d(gin_channels, channels, 1)

    def forward(self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor, g_BG1: torch.Tensor | None = None) -> torch.Tensor:
        x_BCT = x_BCT.detach()
        if g_BG1 is not None:
            x_BCT = x_BCT + self.cond(g_BG1.detach())
        x_BCT = self.drop(self.norm_1(self.conv_1(x_BCT * mask_B1T).relu()))
        x_BCT = self.drop(self.norm_2(self.conv_2(x_BCT * mask_B1T).relu()))
        return self.proj(x_BCT * mask_B1T).float() * mask_B1T


# ---- layers of the decoder ----


def _same_conv(channels: int, kernel_size: int, dilation: int) -> nn.Module:
    pad = dilation * (kernel_size - 1) // 2
    return weight_norm(nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding=pad))


class ResBlock1(nn.Module):
    """HiFi-GAN's residual block: each dilated convolution is followed by a plain one; [B, C, S] to [B, C, S]."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same_conv(channels, kernel_size, d) for d in dilations)
        self.convs2 = nn.ModuleList(_same_conv(channels, kernel_size, 1) for _ in dilations)

    def forward(self, x_BCS: torch.Tensor) -> torch.Tensor:
        for conv1, conv2 in zip(self.convs1, self.convs2):
            x_BCS = x_BCS + conv2(F.leaky_relu(conv1(F.leaky_relu(x_BCS, SLOPE)), SLOPE))
        return x_BCS


class ResBlock2(nn.Module):
    """HiFi-GAN's smaller residual block: dilated convolutions alone; [B, C, S] to [B, C, S]."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_same_conv(channels, kernel_size, d) for d in dilations)

    def forward(self, x_BCS: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x_BCS = x_BCS + conv(F.leaky_relu(x_BCS, SLOPE))
        return x_BCS


class Generator(nn.Module):
    """The decoder: HiFi-GAN's generator (Kong et al. 2020, arXiv:2010.05646); latents [B, inter, F] to [B, 1, S]."""

    def __init__(self, config: VitsConfig) -> None:
        super().__init__()
        c = config.upsample_initial_channel
        block = ResBlock1 if config.resblock == "1" else ResBlock2
        self.conv_pre = nn.Conv1d(config.inter_channels, c, 7, padding=3)
        if config.gin_channels:
            self.cond = nn.Conv1d(config.gin_channels, c, 1)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes):
            up = nn.ConvTranspose1d(c, c // 2, kernel, stride=rate, padding=(kernel - rate) // 2)
            self.ups.append(weight_norm(up))
            c //= 2
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes):
                self.resblocks.append(block(c, size, dilations))
        self.conv_post = nn.Conv1d(c, 1, 7, padding=3, bias=False)

    def forward(self, z_BCF: torch.Tensor, g_BG1: torch.Tensor | None = None) -> torch.Tensor:
        x_BCS = self.conv_pre(z_BCF)
        if g_BG1 is not None:
            x_BCS = x_BCS + self.cond(g_BG1)
        side_by_side = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x_BCS = up(F.leaky_relu(x_BCS, SLOPE))
            first, *others = self.resblocks[i * side_by_side : (i + 1) * side_by_side]
            y_BCS = first(x_BCS)
            for block in others:
                y_BCS = y_BCS + block(x_BCS)
            x_BCS = y_BCS / side_by_side
        return torch.tanh(self.conv_post(F.leaky_relu(x_BCS)))


# ---- discriminators ----


class DiscriminatorP(nn.Module):
    """Judges every ``period``-th sample: [B, 1, S] to scores [B, X] and the features of each layer."""

    def __init__(self, period: int, channels: list[int], kernel_size: int = 5, stride: int = 3) -> None:
        super().__init__()
        self.period = period
        strides = [stride] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(c_in, c_out, (kernel_size, 1), (step, 1), padding=(kernel_size // 2, 0)))
            for c_in, c_out, step in zip([1, *channels], channels, strides)
        )
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, x_B1S: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = mirror(x_B1S, 0, -x_B1S.size(2) % self.period).unflatten(2, (-1, self.period))
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        features.append(self.conv_post(x))
        return features[-1].flatten(1), features


class DiscriminatorS(nn.Module):
    """Judges the waveform itself, with ever longer strides: [B, 1, S] to scores [B, X] and the features of each layer.

    With the authors' channels its groups are theirs: 1, 4, 16, 64, 256, 1.
    """

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        last = len(channels) - 1
        self.convs = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([1, *channels], channels)):
            groups = 1 if i in (0, last) else math.gcd(4**i, c_in, c_out)
            kernel, stride = (15, 1) if i == 0 else (5, 1) if i == last else (41, 4)
            self.convs.append(weight_norm(nn.Conv1d(c_in, c_out, kernel, stride, groups=groups, padding=kernel // 2)))
        self.conv_post = weight_norm(nn.Conv1d(channels[-1], 1, 3, padding=1))

    def forward(self, x_B1S: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, features = x_B1S, []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        features.append(self.conv_post(x))
        return features[-1].flatten(1), features


class MultiPeriodDiscriminator(nn.Module):
    """All discriminators on one waveform [B, 1, S]: lists, with an entry for each, of scores and of features."""

    def __init__(self, config: VitsConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([DiscriminatorS(config.disc_scale_channels)])
        for period in config.disc_periods:
            self.discriminators.append(DiscriminatorP(period, config.disc_period_channels))

    def forward(self, x_B1S: torch.Tensor) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        judged = [discriminator(x_B1S) for discriminator in self.discriminators]
        return [scores for scores, _ in judged], [features for _, features in judged]


# ---- losses, all in fp32 ----


def discriminator_loss(real: list[torch.Tensor], generated: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares losses of the scores of real and of generated waveforms, each summed over the discriminators."""
    loss_real = sum((1 - scores.float()).square().mean() for scores in real)
    loss_generated = sum(scores.float().square().mean() for scores in generated)
    return loss_real, loss_generated


def generator_loss(generated: list[torch.Tensor]) -> torch.Tensor:
    """Least-squares loss of a generator whose waveforms got these scores, summed over the discriminators."""
    return sum((1 - scores.float()).square().mean() for scores in generated)


def feature_loss(real: list[list[torch.Tensor]], generated: list[list[torch.Tensor]]) -> torch.Tensor:
    """Twice the mean absolute difference of features, summed over layers and discriminators (arXiv:2010.05646)."""
    pairs = [pair for layers in zip(real, generated) for pair in zip(*layers)]
    return 2 * sum((r.detach().float() - g.float()).abs().mean() for r, g in pairs)


def kl_loss(
    z_p_BCF: torch.Tensor,
    logs_q_BCF: torch.Tensor,
    m_p_BCF: torch.Tensor,
    logs_p_BCF: torch.Tensor,
    mask_B1F: torch.Tensor,
) -> torch.Tensor:
    """KL divergence of posterior and prior by the one sample z_p, per frame (eq. 3 and 4): summed over the channels."""
    z_p, logs_q, m_p, logs_p = (x.float() for x in (z_p_BCF, logs_q_BCF, m_p_BCF, logs_p_BCF))
    kl_BCF = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p).square() * torch.exp(-2 * logs_p)
    return (kl_BCF * mask_B1F).sum() / mask_B1F.sum()


def expand_prior(
    m_p_BCT: torch.Tensor, logs_p_BCT: torch.Tensor, path_BFT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens' priors, each repeated for the frames that it lasts: two of [B, C, F]."""
    with torch.autocast(path_BFT.device.type, enabled=False):  # a selection must not round
        path_BTF = path_BFT.mT
        return m_p_BCT @ path_BTF, logs_p_BCT @ path_BTF


# ---- model ----


class Vits(TrainerModel):
    """Speaks text: tokens [B, T] to waveforms [B, S]. Optimizer 0 trains the discriminator, 1 the generator."""

    def __init__(self, config: VitsConfig) -> None:
        super().__init__()
        if config.phonemes is None:
            config.phonemes = phonemes_available()  # decided now and saved with the run: a model reads one or the other
        self.config = config
        self.enc_p = TextEncoder(config)
        self.dec = Generator(config)
        self.enc_q = PosteriorEncoder(config)
        self.flow = ResidualCouplingBlock(config)
        c, g = config.hidden_channels, config.gin_channels
        if config.use_sdp:
            self.dp = StochasticDurationPredictor(c, config.dp_dropout, g)
        else:
            self.dp = DurationPredictor(c, config.dp_filter_channels, config.dp_dropout, g)
        if config.num_speakers > 1:
            self.emb_g = nn.Embedding(config.num_speakers, g)
        self.disc = MultiPeriodDiscriminator(config)
        filters_MN = mel_filterbank(
            config.sample_rate, config.filter_length, config.n_mel_channels, config.mel_fmin, config.mel_fmax
        )
        self.register_buffer("mel_filters", filters_MN, persistent=False)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens as the config says; made at its first use, for it may look for installed phonemes."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.config.phonemes, self.config.add_blank)
        return self._tokenizer

    def _speaker(self, speaker_ids_B: torch.Tensor | None) -> torch.Tensor | None:
        """The embeddings [B, G, 1] of speakers, or None for a model of one speaker."""
        if self.config.num_speakers == 1:
            return None
        if speaker_ids_B is None:
            raise ValueError(
                f"speaker_ids=None: this model has {self.config.num_speakers} speakers; give an id for each text"
            )
        return self.emb_g(speaker_ids_B).unsqueeze(-1)

    def _linear(self, wave_BS: torch.Tensor, lengths_B: torch.Tensor | None) -> torch.Tensor:
        c = self.config
        return linear_spectrogram(wave_BS, c.filter_length, c.hop_length, c.win_length, lengths_B)

    # ---- training ----

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The generator's pass in training, on a batch that ``format_batch_on_device`` has seen.

        Returns:
            real and generated: waveform segments [B, 1, segment_size]; mel_real: their mel [B, M, F'];
            alignment [B, F, T]; loss_dur and loss_kl, both scalars.
        """
        tokens_BT, linear_BNF = batch["tokens"], batch["linear"]
        text_B1T = sequence_mask(batch["token_lengths"], tokens_BT.size(1))
        frames_B1F = sequence_mask(batch["spec_lengths"], linear_BNF.size(2))
        g_BG1 = self._speaker(batch["speaker_ids"])
        x_BCT, m_p_BCT, logs_p_BCT = self.enc_p(tokens_BT, text_B1T)
        z_BCF, _, logs_q_BCF = self.enc_q(linear_BNF, frames_B1F, g_BG1)
        z_p_BCF = self.flow(z_BCF, frames_B1F, g_BG1)
        with torch.no_grad():
            scores_BFT = prior_scores(z_p_BCF, m_p_BCT, logs_p_BCT)
            path_BFT = search_alignment(scores_BFT, batch["spec_lengths"], batch["token_lengths"])
        loss_dur = self._duration_loss(x_BCT, text_B1T, path_BFT.sum(1, keepdim=True), g_BG1)
        m_p_BCF, logs_p_BCF = expand_prior(m_p_BCT, logs_p_BCT, path_BFT)
        frames, hop = self.config.segment_size // self.config.hop_length, self.config.hop_length
        starts_B = random_starts(batch["spec_lengths"], frames)
        mel_BMF = log_mel(linear_BNF, self.mel_filters)
        return {
            "generated": self.dec(slice_segments(z_BCF, starts_B, frames), g_BG1),
            "real": slice_segments(batch["waveform"].unsqueeze(1), starts_B * hop, frames * hop),
            "mel_real": slice_segments(mel_BMF, starts_B, frames),
            "alignment": path_BFT,
            "loss_dur": loss_dur,
            "loss_kl": kl_loss(z_p_BCF, logs_q_BCF, m_p_BCF, logs_p_BCF, frames_B1F) * self.config.c_kl,
        }

    def _duration_loss(
        self, x_BCT: torch.Tensor, mask_B1T: torch.Tensor, durations_B1T: torch.Tensor, g_BG1: torch.Tensor | None
    ) -> torch.Tensor:
        """Per token: the bound of -log p(durations), or the squared error of the log-durations."""
        if self.config.use_sdp:
            return self.dp(x_BCT, mask_B1T, durations_B1T, g_BG1).sum() / mask_B1T.sum()
        error_B1T = self.dp(x_BCT, mask_B1T, g_BG1) - torch.log(durations_B1T + 1e-6) * mask_B1T
        return error_B1T.square().sum() / mask_B1T.sum()

    def train_step(
        self, batch: dict[str, Any], criterion: None, optimizer_idx: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Losses of the discriminator (0) or the generator (1).

        The generator runs once for both: the discriminator's pass leaves what it computed in the batch.
        """
        if optimizer_idx == 0:
            batch[FORWARD] = self(batch)
            return self._discriminator_step(batch[FORWARD])
        passed = batch.pop(FORWARD, None)
        return self._generator_step(self(batch) if passed is None else passed)

    def eval_step(
        self, batch: dict[str, Any], criterion: None, optimizer_idx: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return self.train_step(batch, criterion, optimizer_idx)

    def _discriminator_step(self, passed: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
        both = torch.cat([passed["real"], passed["generated"].detach().float()])
        scores, _ = self.disc(both)
        real, generated = zip(*(s.chunk(2) for s in scores))
        loss_real, loss_generated = discriminator_loss(real, generated)
        loss = loss_real + loss_generated
        return {}, {
            "loss": loss,
            "loss_disc": loss.detach(),
            "loss_disc_real": loss_real.detach(),
            "loss_disc_generated": loss_generated.detach(),
        }

    def _generator_step(
        self, passed: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with torch.no_grad():
            _, real_features = self.disc(passed["real"])
        scores, features = self.disc(passed["generated"])
        mel_BMF = log_mel(self._linear(passed["generated"].squeeze(1), None), self.mel_filters)
        losses = {
            "loss_gen": generator_loss(scores),
            "loss_feat": feature_loss(real_features, features),
            "loss_mel": F.l1_loss(passed["mel_real"], mel_BMF) * self.config.c_mel,
            "loss_dur": passed["loss_dur"],
            "loss_kl": passed["loss_kl"],
        }
        outputs = {name: passed[name].detach() for name in ("generated", "real", "mel_real", "alignment")}
        outputs["mel_generated"] = mel_BMF.detach()
        return outputs, {"loss": sum(losses.values()), **{name: loss.detach() for name, loss in losses.items()}}

    def get_criterion(self) -> None:
        """None: the losses are the functions above."""
        return None

    def get_optimizer(self) -> list[torch.optim.Optimizer]:
        """AdamW of the discriminator, AdamW of everything else."""
        c = self.config
        rates = c.lr if isinstance(c.lr, list) else [c.lr, c.lr]
        generator = [p for name, p in self.named_parameters() if not name.startswith("disc.")]
        # fused on a GPU: quicker, and it can leave an update out without waiting for the host
        fused = generator[0].is_cuda or None
        return [
            torch.optim.AdamW(parameters, lr=rate, betas=tuple(c.betas), eps=c.eps, fused=fused)
            for parameters, rate in zip((list(self.disc.parameters()), generator), rates)
        ]

    def get_scheduler(self, optimizer: list[torch.optim.Optimizer]) -> list[torch.optim.lr_scheduler.LRScheduler]:
        return [torch.optim.lr_scheduler.ExponentialLR(o, self.config.lr_decay) for o in optimizer]

    # ---- inference ----

    @torch.inference_mode()
    def inference(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        speaker_ids: torch.Tensor | None = None,
        noise_scale: float = 0.667,
        noise_scale_w: float = 0.8,
        length_scale: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Speak.

        Args:
            tokens: int64 [B, T].
            lengths: tokens of each text, [B]; none when none is padded.
            speaker_ids: [B], for a model of several speakers.
            noise_scale: spread of the latents around the prior; 0 takes its mean.
            noise_scale_w: spread of the durations; 0 takes the same ones every time.
            length_scale: factor of all durations.

        Returns:
            waveform [B, S] in [-1, 1] with silence behind its length, lengths [B] in samples, alignment [B, F, T],
            durations [B, T] in frames. The decoder has no mask: the last few frames of a text that is padded in its
            batch sound a little different than they do alone.

        Raises:
            ValueError: the model has several speakers and speaker_ids are missing.
        """
        if lengths is None:
            lengths = torch.full((tokens.size(0),), tokens.size(1), device=tokens.device)
        g_BG1 = self._speaker(speaker_ids)
        text_B1T = sequence_mask(lengths, tokens.size(1))
        x_BCT, m_p_BCT, logs_p_BCT = self.enc_p(tokens, text_B1T)
        if self.config.use_sdp:
            log_durations_B1T = self.dp.sample(x_BCT, text_B1T, g_BG1, noise_scale_w)
        else:
            log_durations_B1T = self.dp(x_BCT, text_B1T, g_BG1)
        frames_B1T = torch.exp(log_durations_B1T).clamp_max(self.config.max_token_frames)
        durations_BT = torch.ceil(frames_B1T * text_B1T * length_scale).squeeze(1).long()
        frame_lengths_B = durations_BT.sum(1).clamp_min(1)
        frames = int(frame_lengths_B.max())
        frames_B1F = sequence_mask(frame_lengths_B, frames)
        path_BFT = path_of_durations(durations_BT, frames)
        m_p_BCF, logs_p_BCF = expand_prior(m_p_BCT, logs_p_BCT, path_BFT)
        z_p_BCF = m_p_BCF + torch.randn_like(m_p_BCF) * torch.exp(logs_p_BCF) * noise_scale
        z_BCF = self.flow(z_p_BCF, frames_B1F, g_BG1, reverse=True) * frames_B1F
        lengths_B, wave_B1S = frame_lengths_B * self.config.hop_length, self.dec(z_BCF, g_BG1).float()
        return {
            "waveform": (wave_B1S * sequence_mask(lengths_B, wave_B1S.size(2))).squeeze(1),
            "lengths": lengths_B,
            "alignment": path_BFT,
            "durations": durations_BT,
        }

    @torch.inference_mode()
    def voice_conversion(
        self, waveform: torch.Tensor, lengths: torch.Tensor, source_ids: torch.Tensor, target_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Say the same with another voice (section 2.1.2: the flow takes the speaker out and puts another one in).

        Args:
            waveform: [B, S] at the config's sample_rate.
            lengths: samples of each waveform, [B].
            source_ids: who speaks, [B].
            target_ids: who is to speak, [B].

        Returns:
            waveform [B, S'] and lengths [B], whole frames of hop_length samples.

        Raises:
            ValueError: the model has one speaker.
        """
        if self.config.num_speakers == 1:
            raise ValueError("num_speakers=1: converting voices needs a model that was trained on several speakers")
        source_BG1, target_BG1 = self._speaker(source_ids), self._speaker(target_ids)
        frame_lengths_B = lengths // self.config.hop_length
        linear_BNF = self._linear(waveform, lengths)
        frames_B1F = sequence_mask(frame_lengths_B, linear_BNF.size(2))
        z_BCF, _, _ = self.enc_q(linear_BNF, frames_B1F, source_BG1)
        z_p_BCF = self.flow(z_BCF, frames_B1F, source_BG1)
        z_BCF = self.flow(z_p_BCF, frames_B1F, target_BG1, reverse=True) * frames_B1F
        lengths_B, wave_B1S = frame_lengths_B * self.config.hop_length, self.dec(z_BCF, target_BG1).float()
        return {"waveform": (wave_B1S * sequence_mask(lengths_B, wave_B1S.size(2))).squeeze(1), "lengths": lengths_B}

    # ---- what is shown ----

    def train_log(self, batch: dict[str, Any], outputs: dict, logger: Any, steps: int) -> None:
        figures, audios = self._show(batch, outputs)
        logger.train_figures(steps, figures)
        logger.train_audios(steps, audios, self.config.sample_rate)

    def eval_log(self, batch: dict[str, Any], outputs: dict, logger: Any, steps: int) -> None:
        """The first sample: its segment decoded from the audio, and all of it spoken from the text."""
        figures, audios = self._show(batch, outputs)
        T, S = int(batch["token_lengths"][0]), int(batch["wave_lengths"][0])
        said = self.inference(batch["tokens"][:1, :T], speaker_ids=batch["speaker_ids"][:1])
        for name, wave_S in (("spoken", said["waveform"][0]), ("recorded", batch["waveform"][0, :S])):
            figures[name] = plot_spectrogram(self._mel(wave_S), name)
            audios[name] = wave_S.cpu().numpy()
        logger.eval_figures(steps, figures)
        logger.eval_audios(steps, audios, self.config.sample_rate)

    def _mel(self, wave_S: torch.Tensor) -> torch.Tensor:
        # with a length: a text of one token may be spoken in fewer samples than can be mirrored
        length_B = torch.full((1,), wave_S.size(0), device=wave_S.device)
        return log_mel(self._linear(wave_S.unsqueeze(0), length_B), self.mel_filters)[0]

    def _show(self, batch: dict[str, Any], outputs: dict) -> tuple[dict[str, Any], dict[str, Any]]:
        """Figures and audio of the first sample, from what the generator's pass returned."""
        frames, T = int(batch["spec_lengths"][0]), int(batch["token_lengths"][0])
        figures = {
            "alignment": plot_alignment(outputs["alignment_1"][0, :frames, :T], batch["names"][0]),
            "segment_real": plot_spectrogram(outputs["mel_real_1"][0], "real"),
            "segment_generated": plot_spectrogram(outputs["mel_generated_1"][0], "generated"),
        }
        audios = {f"segment_{name}": outputs[f"{name}_1"][0, 0].float().cpu().numpy() for name in ("real", "generated")}
        return figures, audios

    def test_run(self, trainer: Any) -> dict[str, dict[str, Any]]:
        """Speak the config's sentences, each with the next speaker, into the run's folder test_audios."""
        spoken = {}
        for i, sentence in enumerate(self.config.test_sentences):
            tokens_BT = torch.tensor([self.tokenizer.encode(sentence)], device=self.mel_filters.device)
            speaker_B = torch.full((1,), i % self.config.num_speakers, device=tokens_BT.device)
            said = self.inference(tokens_BT, speaker_ids=speaker_B)
            wave_S = said["waveform"][0].cpu().numpy()
            path = trainer.output_path / "test_audios" / f"{trainer.total_steps_done}-{i}.wav"
            write_audio(path, wave_S, self.config.sample_rate)
            spoken[f"{i}"] = {"waveform": wave_S, "alignment": said["alignment"][0].cpu()}
        return spoken

    def test_log(self, outputs: dict[str, dict[str, Any]], logger: Any, steps: int) -> None:
        alignments = {name: plot_alignment(said["alignment"], f"sentence {name}") for name, said in outputs.items()}
        logger.test_figures(steps, alignments)
        logger.test_audios(steps, {name: said["waveform"] for name, said in outputs.items()}, self.config.sample_rate)

    # ---- data ----

    def get_data_loader(self, config: VitsConfig, is_eval: bool, samples: list, verbose: bool):
        """A loader of ``samples`` (SpeechSample), in batches of similar length.

        Raises:
            DataError: (a ValueError) samples that cannot be trained on, or speakers that the config does not name.
        """
        if config.num_symbols < len(SYMBOLS):
            raise DataError(f"num_symbols={config.num_symbols}: the tokenizer gives {len(SYMBOLS)} symbols; set that")
        dataset = SpeechDataset(
            samples,
            self.tokenizer,
            sample_rate=config.sample_rate,
            hop_length=config.hop_length,
            segment_size=config.segment_size,
            min_seconds=config.min_seconds,
            max_seconds=config.max_seconds,
            max_tokens=config.max_tokens,
            speakers=speaker_ids_of(config, samples),
            cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
        )
        return build_loader(
            dataset,
            config.eval_batch_size if is_eval else config.batch_size,
            collate_fn=collate,
            seed=config.training_seed,
            shuffle=not is_eval,
            lengths=dataset.lengths,
            num_workers=config.num_loader_workers,
        )

    @torch.no_grad()
    def format_batch_on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add linear [B, N, F] and spec_lengths [B], computed from the waveforms where the model is."""
        batch["spec_lengths"] = batch["wave_lengths"] // self.config.hop_length
        batch["linear"] = self._linear(batch["waveform"], batch["wave_lengths"])
        return batch

    # ---- weights of others ----

    def load_pretrained(self, source: str | Path | Mapping[str, torch.Tensor]) -> None:
        """Take over weights: the authors' G_*.pth or D_*.pth, Hugging Face's VitsModel, or a checkpoint of this model.

        Generator and discriminator may come from different files: each is loaded whole, or left as it is.

        Args:
            source: a file (.pth, .bin or .safetensors) or a state dict.

        Raises:
            ValueError: weights are missing, unexpected or of other shapes; nothing is loaded. The message lists them,
                and the config fields that decide about them.
        """
        state = to_own_names(load_weights(source) if isinstance(source, str | Path) else dict(source))
        own = self.state_dict()
        state = to_weight_norm(state, own)
        parts = {name.startswith("disc.") for name in state}
        wanted = {name: weight for name, weight in own.items() if name.startswith("disc.") in parts}
        check_weights(state, wanted)
        self.load_state_dict(state, strict=False)


# ---- weights of others: names ----

# Patterns of Hugging Face's names and what stands here instead, replaced in this order.
_LAYER = r"^text_encoder\.encoder\.layers\.(\d+)\."
_HUGGING_FACE = [
    (r"^text_encoder\.embed_tokens\.", "enc_p.emb."),
    (r"^text_encoder\.project\.", "enc_p.proj."),
    (_LAYER + r"attention\.([qkv])_proj\.", r"enc_p.encoder.attn_layers.\1.conv_\2."),
    (_LAYER + r"attention\.out_proj\.", r"enc_p.encoder.attn_layers.\1.conv_o."),
    (_LAYER + r"attention\.", r"enc_p.encoder.attn_layers.\1."),
    (_LAYER + r"layer_norm\.", r"enc_p.encoder.norm_layers_1.\1."),
    (_LAYER + r"feed_forward\.", r"enc_p.encoder.ffn_layers.\1."),
    (_LAYER + r"final_layer_norm\.", r"enc_p.encoder.norm_layers_2.\1."),
    (r"^posterior_encoder\.(conv_)?", "enc_q."),
    (r"^(flow\.flows\.\d+)\.conv_", r"\1."),
    (r"^decoder\.upsampler\.", "dec.ups."),
    (r"^decoder\.", "dec."),
    (r"^embed_speaker\.", "emb_g."),
    (r"\.wavenet\.", ".enc."),
    (r"^duration_predictor\.", "dp."),
    (r"^(dp\..*)conv_(pre|proj)\.", r"\1\2."),
    (r"^(dp\..*)conv_dds\.", r"\1convs."),
    (r"\.convs_dilated\.", ".convs_sep."),
    (r"\.convs_pointwise\.", ".convs_1x1."),
    (r"\.translate$", ".m"),
    (r"\.log_scale$", ".logs"),
    (r"(\.norm(s|_layers)?_\d(\.\d+)?)\.weight$", r"\1.gamma"),
    (r"(\.norm(s|_layers)?_\d(\.\d+)?)\.bias$", r"\1.beta"),
    # Here a Flip, which has no weights, has a place behind every coupling; dp's flows begin with one that is none.
    (r"^(flow\.flows)\.(\d+)", lambda found: f"{found[1]}.{2 * int(found[2])}"),
    (r"^(dp\.(post_)?flows)\.(\d+)", lambda found: f"{found[1]}.{max(0, 2 * int(found[3]) - 1)}"),
]
# Which config fields decide about a weight; the first that its name contains.
_FIELDS = [
    ("disc.discriminators.0.", "disc_scale_channels"),
    ("disc.", "disc_periods, disc_period_channels"),
    ("emb_g.", "num_speakers, gin_channels"),
    ("cond", "num_speakers, gin_channels"),
    ("enc_p.emb.", "num_symbols, hidden_channels"),
    ("enc_p.proj.", "inter_channels, hidden_channels"),
    ("emb_rel", "window_size, n_heads, hidden_channels"),
    ("attn_layers", "n_layers, hidden_channels"),
    ("ffn_layers", "n_layers, filter_channels, kernel_size"),
    ("norm_layers", "n_layers, hidden_channels"),
    ("enc_q.pre.", "filter_length, hidden_channels"),
    ("enc_q.proj.", "inter_channels, hidden_channels"),
    ("enc_q.", "posterior_layers, hidden_channels, wn_kernel_size"),
    ("flow.", "n_flows, flow_layers, inter_channels, hidden_channels, wn_kernel_size"),
    ("dp.", "use_sdp, hidden_channels, dp_filter_channels"),
    ("dec.resblocks.", "resblock, resblock_kernel_sizes, resblock_dilation_sizes, upsample_initial_channel"),
    ("dec.ups.", "upsample_rates, upsample_kernel_sizes, upsample_initial_channel"),
    ("dec.", "upsample_initial_channel, inter_channels"),
]


def to_own_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under this file's names, from the authors' or Hugging Face's."""
    state = {name.removeprefix("module."): weight for name, weight in state.items()}
    if any(name.startswith("text_encoder.") for name in state):
        return {_name_here(name): _shape_here(name, weight) for name, weight in state.items()}
    return {f"disc.{name}" if name.startswith("discriminators.") else name: weight for name, weight in state.items()}


def _name_here(name: str) -> str:
    for theirs, ours in _HUGGING_FACE:
        name = re.sub(theirs, ours, name)
    return name


def _shape_here(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Hugging Face has linear layers where the authors have convolutions of width 1."""
    return weight.unsqueeze(-1) if "attention" in name and name.endswith("_proj.weight") else weight


def to_weight_norm(state: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names of torch's new weight norm, from its old names and from weights without it."""
    found = {}
    for name, weight in state.items():
        new = name.replace(".weight_g", ".parametrizations.weight.original0")
        new = new.replace(".weight_v", ".parametrizations.weight.original1")
        stem = new.removesuffix("weight") + "parametrizations.weight.original"
        if new.endswith(".weight") and f"{stem}1" in own:
            found[f"{stem}0"] = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
            found[f"{stem}1"] = weight
        else:
            found[new] = weight
    return found


def check_weights(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Raise a ValueError that lists missing, unexpected and mis-shaped weights and the config fields behind them."""
    problems = [(name, f"missing, {list(w.shape)} here") for name, w in wanted.items() if name not in found]
    problems += [(name, f"unexpected, {list(w.shape)} there") for name, w in found.items() if name not in wanted]
    problems += [
        (name, f"{list(found[name].shape)} there, {list(w.shape)} here")
        for name, w in wanted.items()
        if name in found and found[name].shape != w.shape
    ]
    if not found:
        raise ValueError("the checkpoint holds no weights")
    if not problems:
        return
    lines = []
    for name, problem in problems:
        fields = next((fields for part, fields in _FIELDS if part in name), "no config field decides about it")
        lines.append(f"  {name}: {problem} ({fields})")
    count = "1 weight does" if len(problems) == 1 else f"{len(problems)} weights do"
    raise ValueError(
        "\n".join([f"{count} not fit this model; the config fields to change are in parentheses:", *lines])
    )


# ---- data ----


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of a SpeechDataset to a batch, padded with 0: tokens [B, T], waveform [B, S] and their lengths [B]."""
    pad = nn.utils.rnn.pad_sequence
    return {
        "tokens": pad([sample["tokens"] for sample in samples], batch_first=True),
        "token_lengths": torch.tensor([len(sample["tokens"]) for sample in samples]),
        "waveform": pad([sample["waveform"] for sample in samples], batch_first=True),
        "wave_lengths": torch.tensor([len(sample["waveform"]) for sample in samples]),
        "speaker_ids": torch.tensor([sample["speaker"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
        "texts": [sample["text"] for sample in samples],
    }


def speaker_ids_of(config: VitsConfig, samples: list) -> dict[str, int] | None:
    """The id of each speaker's name, or None for a model of one speaker."""
    if config.num_speakers == 1:
        return None
    if not config.speakers:
        names = sorted({sample.speaker for sample in samples})
        raise DataError(f"speakers=[]: name the {config.num_speakers} speakers; the samples have {names}")
    return {name: i for i, name in enumerate(config.speakers)}


# A VITS that two CPU cores train in minutes, the same parts, narrow and shallow: VitsConfig(**SMALL).
SMALL = {
    "segment_size": 4096,
    "inter_channels": 32,
    "hidden_channels": 64,
    "filter_channels": 128,
    "n_layers": 2,
    "posterior_layers": 4,
    "n_flows": 2,
    "flow_layers": 2,
    "dp_filter_channels": 64,
    "resblock": "2",
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 2], [2, 6]],
    "upsample_rates": [8, 8, 4],
    "upsample_kernel_sizes": [16, 16, 8],
    "upsample_initial_channel": 128,
    "disc_periods": [2, 3, 5],
    "disc_period_channels": [8, 16, 32, 32],
    "disc_scale_channels": [8, 16, 32, 32],
    "lr": 1e-3,
    "batch_size": 8,
    "eval_batch_size": 8,
    "epochs": 80,
    "run_eval_epochs": 10,
    "save_step": 500,
}
