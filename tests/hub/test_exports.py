"""Exported runs by the plain calls that other libraries document: rows, texts and classes as ours.

The runs are those of tests/recipes/old_runs.tar.xz, small and half-trained.
"""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import random_weights, unpack_old_runs
from peft import AutoPeftModelForCausalLM
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPModel, pipeline

from tinyfm import generate, tokenizer
from tinyfm.adapt import chat
from tinyfm.adapt.heads import Classifier
from tinyfm.autoencoder import Autoencoder, AutoencoderConfig
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.evaluate import zero_shot
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.hub import classifier
from tinyfm.hub.__main__ import export_model, main
from tinyfm.recipes.autoencoder import AutoencoderClassifyRun
from tinyfm.recipes.clip import CLIPClassifyRun
from tinyfm.recipes.gpt import STYLES, GPTClassifyRun
from tinyfm.recipes.run_dir import open_run

transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()
TEXTS = ["a cat", "a picture of a lazy dog", "", "naïve 中文 🙂  two  spaces"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return unpack_old_runs(tmp_path_factory.mktemp("exports"))


@pytest.fixture
def export(runs, monkeypatch, tmp_path, capsys):
    """Export a run of a name; returns the opened run, the new folder and what was printed."""
    monkeypatch.chdir(runs)
    # test_card.py has the cost on the card; to count it takes longer than the export.
    monkeypatch.setattr("tinyfm.recipes.card.describe_cost", lambda opened, watts: "")

    def exported(name: str, *words: str):
        main([f"runs/{name}", str(tmp_path / name), *words])
        return open_run(f"runs/{name}"), tmp_path / name, capsys.readouterr().out

    return exported


# ---- texts ---------------------------------------------------------------------------------------


def test_a_gpt_generates_the_same_texts_alone_and_in_a_batch(export):
    opened, folder, _ = export("gpt")
    reference = AutoTokenizer.from_pretrained(folder)
    prompts = ["The with", "A", "import statement of"]
    ids = [opened.tokenizer.encode(prompt) for prompt in prompts]
    assert reference(prompts).input_ids == ids
    assert reference.pad_token_id == opened.tokenizer.eot
    write = pipeline("text-generation", model=str(folder))
    words = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [write(prompt, **words)[0]["generated_text"] for prompt in prompts]
    batch = [one[0]["generated_text"] for one in write(prompts, batch_size=3, **words)]
    sampling = generate.Sampling(8, temperature=0, stop_tokens=(opened.tokenizer.eot,))
    ours = generate.complete(opened.model, ids, sampling)
    assert (
        alone == batch == [opened.tokenizer.decode(row).removesuffix(tokenizer.EOT) for row in ours]
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-unigram", "bpe", "bytes"])
def test_the_chat_template_gives_our_ids(kind, tmp_path):
    size = 257 if kind == "bytes" else 270
    own = tokenizer.train(kind, ["user: assistant: a few words, some more\n"] * 20, size)
    own.chat_template = chat.JINJA
    own.save_pretrained(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be  brief."},
        {"role": "user", "content": " some\n  words!"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "naïve 🙂\n"},
    ]
    rendered = reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    ).input_ids
    assert rendered == chat.render(own, messages)


def test_a_chat_answers_as_here(export):
    opened, folder, _ = export("gpt-chat")
    messages = [{"role": "user", "content": "Hi"}]
    answer = pipeline("text-generation", model=str(folder))(
        messages, max_new_tokens=8, do_sample=False
    )[0]["generated_text"][-1]
    sampling = generate.Sampling(8, temperature=0)
    ours = "".join(chat.reply(opened.model, opened.tokenizer, messages, sampling))
    assert answer["role"] == "assistant"
    assert answer["content"].removeprefix(" ") == ours


def test_a_text_longer_than_the_context_is_written_by_learned_positions(tmp_path):
    """transformers generates 256 tokens by default, more than this model has positions for."""
    config = GPTConfig(
        vocab_size=257, context_length=16, n_layer=1, n_head=2, d_model=16, position="learned",
        norm="layernorm", mlp="gelu", bias=True, qk_norm=False,
    )  # fmt: skip
    model = random_weights(lambda: GPT(config))
    model.save_pretrained(tmp_path, tokenizer.ByteTokenizer())
    text = pipeline("text-generation", model=str(tmp_path))("abc", do_sample=False)
    assert len(AutoTokenizer.from_pretrained(tmp_path)(text[0]["generated_text"]).input_ids) > 3


# ---- CLIP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "bytes"])
def test_a_text_tower_reads_the_same_rows(kind, tmp_path):
    words = ["a picture of a cat, a dog; one line\n"] * 20
    own = tokenizer.train(kind, words, 257 if kind == "bytes" else 270)
    config = CLIPConfig(
        image_size=16, channels=3, stem="patch", image_layer=1, image_width=16, image_head=2,
        vocab_size=270, context_length=24, text_layer=1, text_width=16, text_head=2, embed_dim=8,
    )  # fmt: skip
    model = random_weights(lambda: CLIP(config))
    model.save_pretrained(tmp_path, own)
    texts = [*TEXTS, "a cat " * 30]
    reference = AutoTokenizer.from_pretrained(tmp_path)
    rows = reference(texts, padding=True, truncation=True, return_tensors="pt")
    expected, _ = tokenizer.encode_captions(own, texts, config.context_length)
    assert rows.input_ids.tolist() == expected.tolist()
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = theirs.get_text_features(**rows)
        found = getattr(found, "pooler_output", found)
        ours = zero_shot.embed_texts(model, own, texts)
    torch.testing.assert_close(
        torch.nn.functional.normalize(found, dim=-1), ours, atol=1e-5, rtol=1e-5
    )


def test_zero_shot_classification_of_pictures(export):
    opened, folder, _ = export("clip")
    config = opened.model.config
    size = (config.image_size, config.image_size)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    names = ["cat", "dog", "bird"]
    found = pipeline("zero-shot-image-classification", model=str(folder))(
        Image.fromarray(noise), candidate_labels=names, hypothesis_template="a {}"
    )
    x = torch.from_numpy(noise).permute(2, 0, 1)[None] / 127.5 - 1
    y = zero_shot.embed_texts(opened.model, opened.tokenizer, [f"a {name}" for name in names])
    with torch.no_grad():
        logits = opened.model.scale() * opened.model.encode_image(x) @ y.T
    shares = dict(zip(names, logits.softmax(1)[0].tolist()))
    assert {one["label"]: one["score"] for one in found} == pytest.approx(shares, abs=1e-4)


def grey_clip() -> CLIP:
    """A CLIP of grey pictures, whose pixels are normalised."""
    config = CLIPConfig(
        image_size=16, channels=1, stem="patch", patch_size=4, image_layer=2, image_width=16,
        image_head=2, vocab_size=257, context_length=24, text_layer=1, text_width=16, text_head=2,
        embed_dim=8, image_mean=(0.2,), image_std=(0.7,),
    )  # fmt: skip
    return random_weights(lambda: CLIP(config))


def draw(mode: str) -> Image.Image:
    shape = (16, 16, 3) if mode == "RGB" else (16, 16)
    noise = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(noise)


def seen_in_grey(picture: Image.Image) -> torch.Tensor:
    """The pixels that a model of grey pictures reads, (1, 1, 16, 16)."""
    return torch.from_numpy(np.array(picture.convert("L")))[None, None] / 127.5 - 1


# Pillow rounds the grey of a coloured picture to whole numbers.
TOLERANCE = {"L": 1e-5, "RGB": 3e-3}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_zero_shot_classification_by_a_model_of_grey_pictures(export, tmp_path, mode):
    opened, _, _ = export("clip")
    own, names = tokenizer.ByteTokenizer(), ["cat", "dog", "bird"]
    model = grey_clip()
    grey = replace(opened, model=model, tokenizer=own)
    export_model(grey, Namespace(folder=tmp_path / "grey", overwrite=False))
    find = pipeline("zero-shot-image-classification", model=str(tmp_path / "grey"))
    found = find(draw(mode), candidate_labels=names, hypothesis_template="a {}")
    y = zero_shot.embed_texts(model, own, [f"a {name}" for name in names])
    with torch.no_grad():
        logits = model.scale() * model.encode_image(seen_in_grey(draw(mode))) @ y.T
    shares = dict(zip(names, logits.softmax(1)[0].tolist()))
    assert {one["label"]: one["score"] for one in found} == pytest.approx(
        shares, abs=TOLERANCE[mode]
    )


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_classifier_of_grey_pictures(tmp_path, mode):
    model = Classifier(grey_clip(), {"kind": ("cat", "dog", "bird")}, CLIPClassifyRun.reader)
    torch.nn.init.normal_(model.heads[0].weight, generator=torch.Generator().manual_seed(0))
    classifier.save(model.eval(), tmp_path)
    find = pipeline("image-classification", str(tmp_path), trust_remote_code=True)
    with torch.no_grad():
        p = model.predict({"images": seen_in_grey(draw(mode))})["kind"]
    shares = dict(zip(model.classes["kind"], p[0].tolist()))
    found = {one["label"]: one["score"] for one in find(draw(mode))}
    assert found == pytest.approx(shares, abs=TOLERANCE[mode])


# ---- diffusion -----------------------------------------------------------------------------------


def test_a_diffusion_model_opens_as_a_pipeline(export):
    opened, folder, printed = export("ddpm")
    assert f'DiffusionPipeline.from_pretrained("{folder}")' in printed
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    (picture,) = pipe(generator=generator, num_inference_steps=4, output_type="np").images
    ours = opened.model.sample(1, 4, "ddpm", generators=[torch.Generator().manual_seed(0)])
    ours = (ours[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)
    np.testing.assert_allclose(picture, ours, atol=1e-4)


def test_an_autoencoder_opens_by_the_printed_call(export):
    opened, folder, printed = export("autoencoder")
    assert f'AutoencoderKL.from_pretrained("{folder}")' in printed
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    config = opened.model.config
    z = torch.randn(2, config.latent_channels, *[config.image_size // config.factor] * 2)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.decode(z).sample, opened.model.decode(z), atol=1e-4, rtol=1e-4
        )


def test_the_parts_of_text_to_image_open_and_the_rest_is_said(export):
    opened, folder, printed = export("text2image")
    for word in ("no pipeline with", "CLIP's", f'AutoencoderKL.from_pretrained("{folder}"'):
        assert word in printed
    assert not (folder / "model_index.json").exists()
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    tower = transformers.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    own = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    config = opened.model.config
    assert unet.config.cross_attention_dim == tower.config.hidden_size == config.clip.text_width
    assert vae.config.latent_channels == unet.config.in_channels
    rows = own(["latin small letter a"], truncation=True).input_ids
    expected, _ = tokenizer.encode_captions(
        opened.tokenizer, ["latin small letter a"], config.clip.context_length
    )
    assert rows == expected.tolist()


# ---- classifiers and adapters --------------------------------------------------------------------


def test_a_classifier_of_texts(export):
    opened, folder, printed = export("gpt-classify")
    model = opened.model
    find = pipeline("text-classification", str(folder), trust_remote_code=True, top_k=None)
    assert "trust_remote_code=True" in printed
    texts = ["a good fox", "awful", "a text that is longer than the context " * 20]
    (question,) = model.classes
    for text, found in zip(texts, find(texts, batch_size=3)):
        tokens = torch.tensor([opened.tokenizer.encode(text)[: model.config.context_length]])
        with torch.no_grad():
            p = model.predict({"tokens": tokens, "mask": torch.ones_like(tokens) > 0})[question]
        shares = dict(zip(model.classes[question], p[0].tolist()))
        assert {one["label"]: one["score"] for one in found} == pytest.approx(shares, abs=1e-5)


@pytest.mark.parametrize("style", ["gpt1", "bloom", "command-r"])
def test_a_classifier_on_another_layout(tmp_path, style):
    """BLOOM's config has no context length; Cohere's states are not multiplied."""
    config = GPTConfig(257, 24, n_layer=2, n_head=2, d_model=16, **STYLES[style])
    body = random_weights(lambda: GPT(config))
    model = Classifier(body, {"topic": ("a", "b", "c")}, GPTClassifyRun.reader).eval()
    torch.nn.init.normal_(model.heads[0].weight, generator=torch.Generator().manual_seed(0))
    classifier.save(model, tmp_path, tokenizer.ByteTokenizer())
    find = pipeline("text-classification", str(tmp_path), trust_remote_code=True, top_k=None)
    texts = ["awful", "longer than the context " * 3]
    for text, found in zip(texts, find(texts, batch_size=2)):
        tokens = torch.tensor([list(text.encode()[:24])])
        with torch.no_grad():
            p = model.predict({"tokens": tokens, "mask": tokens >= 0})["topic"]
        shares = dict(zip("abc", p[0].tolist()))
        assert {one["label"]: one["score"] for one in found} == pytest.approx(shares, abs=1e-5)


def test_a_classifier_of_pictures(export):
    opened, folder, _ = export("clip-classify")
    config = opened.model.config
    shape = (config.image_size, config.image_size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    find = pipeline("image-classification", str(folder), trust_remote_code=True)
    found = find(Image.fromarray(noise))
    x = torch.from_numpy(noise).permute(2, 0, 1)[None] / 127.5 - 1
    (question,) = opened.model.classes
    with torch.no_grad():
        p = opened.model.predict({"images": x})[question]
    shares = dict(zip(opened.model.classes[question], p[0].tolist()))
    assert {one["label"]: one["score"] for one in found} == pytest.approx(shares, abs=1e-4)


def test_an_adapter_names_its_base(export, capsys):
    base, base_folder, _ = export("gpt")
    opened, folder, printed = export("gpt-lora", "--adapter", "--base-name", str(base_folder))
    assert str(base_folder) in printed
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    x = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, opened.model(x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(base.model(x), opened.model(x), atol=1e-6)
    _, _, printed = export("gpt-lora", "--adapter", "--overwrite")
    assert "--base-name" in printed


# ---- refusals ------------------------------------------------------------------------------------


def test_a_soft_prompt_cannot_be_exported(export):
    with pytest.raises(SystemExit, match=r"soft prompt.*runs/gpt.*--adapt lora"):
        export("gpt-prompt")


def test_classifiers_that_transformers_does_not_have(tmp_path):
    small = GPTConfig(vocab_size=50, context_length=8, n_layer=1, n_head=2, d_model=16)
    two = {"mood": ("good", "bad"), "kind": ("cat", "dog")}
    with pytest.raises(ValueError, match=r"2 questions \(mood, kind\).*--data\.label-columns"):
        classifier.save(Classifier(GPT(small), two, GPTClassifyRun.reader), tmp_path)
    one = {"kind": ("cat", "dog")}
    body = Autoencoder(AutoencoderConfig(8, channels=(8, 8), groups=4))
    with pytest.raises(ValueError, match="as this Autoencoder is; those of a GPT"):
        classifier.save(Classifier(body, one, AutoencoderClassifyRun.reader), tmp_path)
    with pytest.raises(ValueError, match=r"--model\.stem patch"):
        classifier.save(Classifier(CLIP(CLIPConfig()), one, CLIPClassifyRun.reader), tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("run", "part"), [("gpt", ""), ("autoencoder", ""), ("ddpm", ""), ("ddpm", "unet")]
)
def test_somebody_elses_model_is_not_overwritten(run, part, name, export, tmp_path):
    folder = tmp_path / run / part
    folder.mkdir(parents=True)
    (folder / name).write_text("theirs", encoding="utf-8")
    with pytest.raises(SystemExit, match=f"holds a model already.*{name}"):
        export(run)
    assert [path.name for path in folder.iterdir()] == [name]
    export(run, "--overwrite")


@pytest.mark.parametrize("run", ["gpt", "autoencoder", "ddpm", "clip"])
def test_a_file_is_no_folder_for_a_model(run, export, tmp_path):
    (tmp_path / run).write_text("theirs", encoding="utf-8")
    for words in ((), ("--overwrite",)):
        with pytest.raises(SystemExit, match=f"{run} is a file; name a folder"):
            export(run, *words)


def test_the_settings_to_train_with_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--model\.stem patch"):
        CLIP(CLIPConfig()).save_pretrained(tmp_path)


def test_overwriting_leaves_no_tokenizer_of_before(export, tmp_path):
    folder = tmp_path / "gpt"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 5}), encoding="utf-8")
    opened, folder, _ = export("gpt", "--overwrite")
    assert tokenizer.load(folder).specials == opened.tokenizer.specials
    assert AutoModelForCausalLM.from_pretrained(folder).config.pad_token_id == opened.tokenizer.eot
