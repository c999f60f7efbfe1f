"""The codec: equality with EncodecModel of transformers, weight norm, the loss by hand, errors."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import assert_equal_weights, edit_json, normal, random_weights
from safetensors.torch import load_file, save_file
from transformers import EncodecModel

from tinyfm.codec import Codec, CodecConfig, normed_weight, spectrogram, spectrum_distance

transformers.logging.set_verbosity_error()
TINY = CodecConfig(
    width=4, ratios=(3, 2), latent_channels=6, n_code=16, n_book=3, n_lstm=1,
    windows=(16, 32), sound_length=64,
)  # fmt: skip
SIZES = {
    "sampling_rate": 8000, "num_filters": 4, "upsampling_ratios": [3, 2], "hidden_size": 6,
    "codebook_size": 16, "num_lstm_layers": 2, "target_bandwidths": [16.008],
}  # fmt: skip
KINDS = {
    "causal": {},
    "both sides": {
        "use_causal_conv": False, "use_conv_shortcut": False, "num_residual_layers": 2,
        "audio_channels": 2, "kernel_size": 5, "last_kernel_size": 3, "residual_kernel_size": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def published(request, tmp_path_factory):
    """A model of transformers, and a folder that it was saved to."""
    config = transformers.EncodecConfig(**SIZES | KINDS[request.param])
    theirs = random_weights(lambda: EncodecModel(config), 0.1)
    with torch.no_grad():
        z = theirs.encoder(0.3 * normal(8, config.audio_channels, 60)).movedim(1, 2).flatten(0, 1)
    for i, layer in enumerate(theirs.quantizer.layers):
        spread = z.std(0) * normal(16, 6, seed=i) / 2**i
        layer.codebook.embed.copy_(spread if i else z.mean(0) + spread)  # so that many are used
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return theirs, folder


@torch.no_grad()
def assert_same(ours, theirs):
    """Equal vectors, codes and sounds, also where the last frame is not full."""
    for T in (60, 61, 3):
        sounds = 0.3 * normal(2, ours.config.in_channels, T)
        z = theirs.encoder(sounds)
        torch.testing.assert_close(ours.to_vectors(sounds), z, atol=1e-5, rtol=1e-5)
        codes, scales, _ = theirs.encode(sounds, return_dict=False)
        assert torch.equal(ours.encode(sounds), codes[0])
        expected = theirs.decode(codes, scales)[0]
        torch.testing.assert_close(ours.decode(codes[0]), expected, atol=1e-5, rtol=1e-5)
        rebuilt = ours.rebuild(sounds)
        torch.testing.assert_close(rebuilt, expected[..., :T], atol=1e-5, rtol=1e-5)
        if T == 60:
            assert len(codes.unique()) > 5 and expected.std() > 0.05
            first = theirs.quantizer.decode(codes[0, :, :1].transpose(0, 1))
            torch.testing.assert_close(ours.quantizer.decode(codes[0, :, :1]), first)
            assert torch.equal(ours.encode(sounds, n_book=1), codes[0, :, :1])


# ---- against transformers ------------------------------------------------------------------------


def test_codes_and_sounds_both_ways(published, tmp_path):
    theirs, folder = published
    ours = Codec.from_pretrained(folder)
    assert not ours.training
    assert ours.config.n_book == 3
    assert_same(ours, theirs)

    ours.save_pretrained(tmp_path)
    exported, info = EncodecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(ours, exported)
    again = Codec.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_equal_weights(again, ours)


@pytest.mark.parametrize("n_book", [1, 3, 7, 29])
def test_the_number_of_codebooks_survives_the_bandwidth(n_book, tmp_path):
    """The config of transformers has thousand bits a second in its place, and rounds down."""
    Codec(replace(TINY, n_book=n_book, rate=8001)).save_pretrained(tmp_path)
    theirs = EncodecModel.from_pretrained(tmp_path)
    assert theirs.quantizer.num_quantizers == n_book
    sounds = torch.zeros(1, 1, 12)
    assert theirs.encode(sounds).audio_codes.shape == (1, 1, n_book, 2)
    assert Codec.from_pretrained(tmp_path).config.n_book == n_book


def test_names_of_old_files(published, tmp_path):
    ours = Codec.from_pretrained(published[1])
    ours.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    old = {}
    for name, tensor in load_file(path).items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        old[name.replace("parametrizations.weight.original1", "weight_v")] = tensor
    assert any(name.endswith("weight_v") for name in old)
    save_file(old, path)
    assert_equal_weights(Codec.from_pretrained(tmp_path), ours)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "dac"}, "model_type is 'dac'; supported: encodec"),
        ({"chunk_length_s": 1.0}, "chunk_length_s is 1.0; .*24 and 32 kHz"),
        ({"norm_type": "time_group_norm"}, "norm_type is 'time_group_norm'"),
        ({"normalize": True}, "normalize is True; supported: False"),
        ({"codebook_dim": 8}, "codebook_dim is 8; supported: hidden_size, 6"),
        ({"target_bandwidths": []}, "index out of range"),
        ({"num_filters": 8}, "tensors do not fit config.json"),
    ],
)
def test_refused_settings(fields, message, published, tmp_path):
    Codec.from_pretrained(published[1]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        Codec.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_codebook_that_transformers_does_not_take(tmp_path):
    with pytest.raises(ValueError, match=r"n_code is 12; .* with n_code 16"):
        Codec(replace(TINY, n_code=12)).save_pretrained(tmp_path)


# ---- by hand -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_causal_codec_hears_nothing_ahead():
    """Except for the first frames: the padding in front mirrors what follows."""
    sounds = normal(1, 1, 120)
    changed = sounds.clone()
    changed[..., 90:] = 0
    same = {}
    for causal in (True, False):
        model = random_weights(lambda causal=causal: Codec(replace(TINY, causal=causal)))
        before, after = model.to_vectors(sounds), model.to_vectors(changed)
        same[causal] = torch.allclose(before[..., :15], after[..., :15])
        assert not torch.allclose(before[..., 15:], after[..., 15:])
    assert same == {True: True, False: False}


def test_a_gain_is_the_size_of_its_weights():
    direction = normal(3, 2, 5)
    gain = torch.tensor([1.0, -2, 0.5])
    weight = normed_weight(direction, gain)
    sizes = weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(sizes, torch.tensor([1.0, 2, 0.5]))
    torch.testing.assert_close(normed_weight(7 * direction, gain), weight)


def test_a_sine_in_the_spectrogram():
    """Sixteen samples a wave: of 64 in a window, row 4, at half of the amplitude."""
    t = torch.arange(256.0)
    wave = 0.6 * torch.sin(2 * torch.pi * t / 16)[None, None]
    rows = spectrogram(wave, 64)[0, :, 8]  # a moment in the middle
    assert rows.argmax() == 4 and rows[4].item() == pytest.approx(0.3, abs=1e-4)
    assert rows[7:].max() < 1e-3
    assert spectrum_distance(wave, wave, (16, 64)) == 0
    assert spectrum_distance(wave, -wave, (16, 64)) < 1e-6  # the sign of a wave is not heard
    assert spectrum_distance(wave, 0.5 * wave, (16, 64)) > 0.1


def test_it_learns_and_moves_dead_codes():
    torch.manual_seed(0)
    model = Codec(replace(TINY, dead_after=5))
    t = torch.arange(64)[None, None] / 8000
    tones = 0.5 * torch.sin(2 * torch.pi * torch.tensor([300.0, 700, 1500])[:, None, None] * t)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss, metrics = model.loss({"sounds": tones})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step()
        losses.append(loss.item())
    expected = sum(metrics.values()) - 0.75 * metrics["commitment"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert len(model.encode(tones)[:, 0].unique()) > 4


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"in_channels": 3}, "in_channels is 3; use 1 .mono. or 2"),
        ({"ratios": ()}, r"ratios are \(\); give whole numbers"),
        ({"n_code": 1}, "n_code is 1; .*at least 2"),
        ({"compress": 5}, "compress 5 exceeds width 4"),
        ({"windows": (256,)}, "window of 256 samples .*sound_length 64"),
    ],
)
def test_configs_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def test_codes_and_sounds_that_do_not_fit():
    model = Codec(TINY)
    for code in (16, -1):
        with pytest.raises(ValueError, match=f"no code {code}: the codebook has 0 to 15"):
            model.decode(torch.full((1, 3, 4), code))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\); they must be \(B, 3, places"):
        model.decode(torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="n_book is 4; the model has 3 codebooks"):
        model.encode(torch.zeros(1, 1, 8), n_book=4)
    bad = {
        "have 2 channels, but the model has 1": torch.zeros(1, 2, 8),
        r"\(1, 8\); they must be": torch.zeros(1, 8),
        "are empty": torch.zeros(1, 1, 0),
        "hold a NaN": torch.full((1, 1, 8), torch.nan),
    }
    for message, sounds in bad.items():
        with pytest.raises(ValueError, match=message):
            model.encode(sounds)
    silence = model.rebuild(torch.zeros(1, 1, 13))
    assert silence.shape == (1, 1, 13) and silence.isfinite().all()
