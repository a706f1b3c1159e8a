"""Answers are transformers' own to the tokens that training encodes; checkpoints answer as their
Hugging Face directories do."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import replace

import av
import numpy as np
import peft
import pytest
import torch
from mixed_data import write_image, write_video
from PIL import Image
from qwen2_vl_reference import load_processor, published_text
from safetensors.torch import save_file
from tiny_hf import read, write_weights
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from megatron_vl.ask import terminal
from megatron_vl.ask.answerer import Answerer, Sampling
from megatron_vl.ask.checkpoint import hf_directory
from megatron_vl.ask.dialogue import Dialogue
from megatron_vl.ask.media import stored_media
from megatron_vl.cli.main import run
from megatron_vl.data.conversation import Part, Turn
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.options import TrainedText
from megatron_vl.errors import InputError
from megatron_vl.models import family, load_spec
from megatron_vl.models.media import MediaLimits

NEW = 12  # tokens of an answer
IMAGES = ("--min-pixels", 56 * 56, "--max-pixels", 56 * 56)
FAMILIES = {  # options of the tiny model, and transformers' processor of one with vision
    "qwen2_vl": (("--ranks", 1500), Qwen2VLProcessor),
    "qwen2_5_vl": (("--ranks", 1500), Qwen2_5_VLProcessor),
    "qwen3_vl": (("--ranks", 1500), Qwen3VLProcessor),
    "qwen_vl": (("--hidden-size", 256, "--vision-hidden-size", 32, "--vision-queries", 4, "--ranks",
                 600, *IMAGES), None),
    "qwen2": (("--ranks", 1500), None),
    "qwen3": (("--ranks", 1500), None),
    "qwen3_moe": (("--ranks", 1500), None),
    "qwen3_vl_moe": (("--ranks", 1500), Qwen3VLProcessor),
    "baichuan2": ((), None),
}
OF_TRANSFORMERS = [name for name in FAMILIES if name not in ("qwen_vl", "baichuan2")]
WITH_VISION = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SAID = (("user", "What is this?"), ("assistant", "a red\ncircle"), ("user", "And what colour?"))


@pytest.fixture(scope="module")
def answerers(tmp_path_factory):
    """A directory and its answerer, by the family's name; made once. Weights are large, so that
    every token that is asked, its place and every pixel count in an answer."""
    made, root = {}, tmp_path_factory.mktemp("models")

    def of(name: str) -> tuple:
        if name not in made:
            hf_dir = root / name
            assert run(["tiny", str(hf_dir), "--model-type", name, "--hidden-size", "64",
                        "--ffn-size", "96", *map(str, FAMILIES[name][0]), "--init-std", "0.5",
                        "--dtype", "float32"]) == 0
            # Positions behind a video are then transformers' own, which is the judge.
            limits = MediaLimits(video_positions="transformers5") if name in WITH_VISION else None
            made[name] = hf_dir, Answerer.from_hf_dir(hf_dir, limits=limits)
        return made[name]

    return of


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """An image and a video."""
    root = tmp_path_factory.mktemp("shown")
    return (write_image(root / "a.png", (90, 64)),
            write_video(root / "b.mkv", frames=8, fps=4, size=(84, 64)))


def dialogue(answerer, **options) -> Dialogue:
    return Dialogue(answerer, sampling=Sampling(max_new_tokens=NEW), **options)


def frames_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def by_transformers(hf_dir, processor, messages, image=None, video=None) -> torch.Tensor:
    """New tokens, int64 [N], by transformers alone."""
    if processor is None:
        tokenizer = AutoTokenizer.from_pretrained(hf_dir)
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        both = load_processor(hf_dir, processor)
        model = AutoModelForImageTextToText.from_pretrained(hf_dir, dtype=torch.float32)
        text = both.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        text = published_text(text) if processor is Qwen3VLProcessor else text
        media = {} if image is None else {"images": [Image.open(image)]}
        if video is not None:
            frames = np.stack(frames_of(video)).transpose(0, 3, 1, 2)
            media |= dict(videos=[frames], do_sample_frames=True, fps=2.0, max_frames=128,
                          video_metadata=[dict(total_num_frames=len(frames), fps=4.0)])
        inputs = both(text=[text], return_tensors="pt", **media)
    made = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return made[0, inputs["input_ids"].shape[1] :]


# ---- dialogues -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_streamed_answer_is_transformers_own(name, answerers, shown):
    hf_dir, answerer = answerers(name)
    one, processor = dialogue(answerer), FAMILIES[name][1]
    content, media = "What is this?", {}
    if processor is not None:
        for kind, path in zip(("image", "video"), shown, strict=True):
            one.show(kind, path)
            media[kind] = path
        content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": content}]
    pieces = list(one.ask("What is this?"))
    tokens = by_transformers(hf_dir, processor, [{"role": "user", "content": content}], **media)
    said, is_whole = answerer.text_of(tokens.tolist())
    assert len(pieces) > 1
    assert ("".join(pieces), one.is_whole) == (said, is_whole)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_several_turns_are_what_the_template_makes_of_them(name, answerers):
    hf_dir, answerer = answerers(name)
    one = dialogue(answerer, system="Look.")
    one.turns += [Turn(role=role, parts=(Part(text=text),)) for role, text in SAID[:-1]]
    said = "".join(one.ask(SAID[-1][1]))
    messages = [{"role": role, "content": text} for role, text in (("system", "Look."), *SAID)]
    if name in WITH_VISION:
        messages = [one | {"content": [{"type": "text", "text": one["content"]}]}
                    for one in messages]
    tokens = by_transformers(hf_dir, FAMILIES[name][1], messages)
    assert said == answerer.text_of(tokens.tolist())[0]
    assert [turn.role for turn in one.turns] == ["system", *["user", "assistant"] * 2]


@pytest.mark.parametrize("name", ["qwen_vl", "baichuan2"])
def test_an_answer_is_the_judge_s_to_the_tokens_before_a_trained_one(name, answerers, shown):
    hf_dir, answerer = answerers(name)
    image = (Part(media="image"),) if name == "qwen_vl" else ()
    turns = [Turn(role="user", parts=(*image, Part(text=SAID[0][1]))),
             *(Turn(role=role, parts=(Part(text=text),)) for role, text in SAID[1:])]
    one = dialogue(answerer)
    if image:
        one.show("image", shown[0])
        one.turns, one.media, one.shown = turns[:-1], one.shown, []
    else:
        one.turns = turns[:-1]
    said = "".join(one.ask(SAID[-1][1]))
    stored, read = stored_media(one.media)
    answer = "a cat"
    trained, _, grids = answerer.encoder.encode(
        [*turns, Turn(role="assistant", parts=(Part(text=answer),))], stored
    )
    prompt = answerer.encoder.chat.prompt
    after = {"qwen_vl": lambda: prompt.encoding.encode("a cat<|im_end|>\n", allowed_special="all"),
             "baichuan2": lambda: [*prompt.pieces.encode(answer), 2]}[name]()
    assert trained.tolist()[-len(after) :] == after
    tokens = trained.tolist()[: -len(after)]
    patches = None
    if image:
        patches = torch.empty(*_patches(answerer, grids))
        answerer.encoder.load(stored, grids, read, patches)
    judge = family(load_spec(hf_dir).model_type).judge().from_pretrained(hf_dir)
    made = list(tokens)
    with torch.inference_mode():
        while len(made) < len(tokens) + NEW and made[-1] not in answerer.end_ids:
            inputs = answerer.family.judge_inputs(
                answerer.spec, torch.tensor(made), grids, patches, None)
            made.append(int(judge(input_ids=torch.tensor([made]), **inputs).logits[0, -1].argmax()))
    assert said == answerer.text_of(made[len(tokens) :])[0]


def _patches(answerer, grids):
    return sum(a * b * c for a, b, c in grids), answerer.encoder.processor.patch_dim


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("trained", [
    {}, {"train_on_prompt": True}, {"mask_history": True},
], ids=str)
def test_scored_is_what_follows_the_prompts_of_trained_answers(name, trained, answerers):
    hf_dir, answerer = answerers(name)
    encoder = ModelEncoder.from_hf_dir(
        hf_dir, answerer.spec, answerer.family, trained=TrainedText(**trained)
    )
    turns = [Turn(role=role, parts=(Part(text=text),)) for role, text in
             (*SAID, ("assistant", "blue"), ("user", "No."), ("assistant", "red"))]
    last = len(turns) - 1
    thinks = encoder.chat.thinks  # then the template writes no reasoning, before the last answer
    turns[3] = replace(turns[3], trained=bool(trained))
    tokens, labels, _ = encoder.encode(turns, ())
    expected = torch.zeros(len(tokens), dtype=torch.bool)
    for number in (last,) if "mask_history" in trained else (1, 3, last) if trained else (1, last):
        thinking = False if number == last and thinks else None
        prompt, _ = encoder.encode_prompt(turns[:number], (), thinking=thinking)
        begin = len(prompt) - 1
        assert torch.equal(tokens[: len(prompt)], prompt)
        end = next(at for at in range(begin, len(tokens)) if int(labels[at]) in answerer.end_ids)
        expected[begin : end + 1] = True
    found = encoder.answers(turns, (), ())
    assert torch.equal(found, expected)
    assert (labels[found] >= 0).all()


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_dialogue_goes_back(system, answerers, shown):
    _, answerer = answerers("qwen2_vl")

    def asked(*questions: str) -> Dialogue:
        one = dialogue(answerer, system=system)
        for number, question in enumerate(questions):
            if number < 2:
                one.show("image", shown[0])
            "".join(one.ask(question))
        return one

    gone, expected = asked("what?", "and then?", "why?"), asked("what?")
    gone.show("image", shown[0])
    gone.rewind(1)
    assert (gone.turns, len(gone.media), gone.shown) == (expected.turns, 1, [])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_answers_as_its_questions_alone(name, answerers, shown):
    _, answerer = answerers(name)
    asked = []
    for text in ("a?", "Of what colour are these two, and how many?"):
        one = dialogue(answerer)
        if answerer.spec.vision is not None and text == "a?":
            one.show("image", shown[0])
        asked.append(_question(one, text))
    sampling = Sampling(max_new_tokens=4)
    assert answerer.answers(asked, sampling) == [
        *answerer.answers(asked[:1], sampling), *answerer.answers(asked[1:], sampling)
    ]


def _question(one: Dialogue, text: str):
    parts = (*(Part(media=media.kind) for media in one.shown), Part(text=text))
    stored, read = stored_media(one.shown)
    return one.answerer.decoded(one.answerer.question(
        [Turn(role="user", parts=parts)], stored, read, max_new_tokens=NEW
    ))


@pytest.mark.parametrize("thinking", [None, True, False])
def test_reasoning_is_asked_for_as_the_template_does(thinking, answerers):
    hf_dir, answerer = answerers("qwen3")
    turns = [Turn(role="user", parts=(Part(text="1 + 1?"),))]
    question = answerer.question(turns, (), None, thinking=thinking, max_new_tokens=NEW)
    asked = {} if thinking is None else {"enable_thinking": thinking}
    want = AutoTokenizer.from_pretrained(hf_dir).apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_dict=False,
        **asked,
    )
    assert question.tokens.tolist() == want
    # Without, it is what stands before an answer in training.
    answer = Turn(role="assistant", parts=(Part(text="2"),))
    trained = answerer.encoder.encode([*turns, answer], ())[0].tolist()
    assert (trained[: len(want)] == want) and (len(trained) - len(want) == 3) is (thinking is False)


def test_a_model_s_own_way_to_draw_is_not_taken_for_a_person_s(answerers, tmp_path, capfd):
    hf_dir = shutil.copytree(answerers("qwen2")[0], tmp_path / "hf")
    said = {}
    for penalty in (1.0, 0.01):  # the second leaves nothing but what was said
        drawn = {"do_sample": True, "temperature": 1e-6, "top_k": 1, "top_p": 0.001,
                 "repetition_penalty": penalty}
        (hf_dir / "generation_config.json").write_text(json.dumps(drawn))
        answerer = Answerer.from_hf_dir(hf_dir)
        sampling = Sampling(max_new_tokens=NEW, temperature=1.5)
        draws = ["".join(Dialogue(answerer, sampling=sampling).ask("a?")) for _ in range(2)]
        assert (draws[0] != draws[1]) is (penalty == 1.0)
        said[penalty] = "".join(dialogue(answerer).ask("a?"))
    assert said[1.0] != said[0.01] and "not valid" not in capfd.readouterr().err


def test_a_weight_that_is_missing_is_named(answerers, tmp_path):
    hf_dir = shutil.copytree(answerers("qwen2")[0], tmp_path / "hf")
    weights = read(hf_dir)
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, hf_dir / "model.safetensors")
    with pytest.raises(InputError, match=re.escape("model.layers.2.mlp.up_proj.weight")):
        Answerer.from_hf_dir(hf_dir)


def test_what_is_drawn_depends_on_the_seed_alone(answerers):
    _, answerer = answerers("qwen2")
    said = []
    for seed in (1, 1, 2):
        answerer.seed(seed)
        sampling = Sampling(max_new_tokens=NEW, temperature=1.5, top_p=0.9)
        said.append("".join(Dialogue(answerer, sampling=sampling).ask("a?")))
    assert said[0] == said[1] != said[2]


def test_an_answer_that_is_left_ends_there_and_stays_in_the_dialogue(answerers):
    _, answerer = answerers("qwen2")
    one = Dialogue(answerer, sampling=Sampling(max_new_tokens=400))
    answer = one.ask("a?")
    said = "".join(itertools.islice(answer, 3))
    answer.close()
    assert [turn.role for turn in one.turns] == ["user", "assistant"]
    assert one.turns[1].parts[0].text == said and not one.is_whole


REFUSED = {  # what is done -> what is said
    "an image under a text model": ("qwen2", lambda one, root: one.show("image", root / "a.png"),
                                    "a.png is shown as an image, but this qwen2 takes text alone"),
    "a video under Qwen-VL": ("qwen_vl", lambda one, root: one.show("video", root / "b.mkv"),
                              "b.mkv is shown as a video, but this qwen takes images"),
    "no file": ("qwen2_vl", lambda one, root: one.show("image", root / "c.png"),
                "c.png does not exist; give the file of an image"),
    "no image": ("qwen2_vl", lambda one, root: one.show("image", __file__),
                 "test_ask.py cannot be shown: its image"),
    "a directory": ("qwen2_vl", lambda one, root: one.show("image", root), "is a directory"),
    "too long": ("qwen2", lambda one, root: one.ask("a " * 40_000), "positions of the model; ask "
                 "it otherwise, lower --max-new-tokens, or show less"),
    "a mark": ("qwen2_vl", lambda one, root: one.ask("<|image_pad|>"),
               "its text has 1 image marks"),
    "no such command": ("qwen2", lambda one, root: terminal._is_last(one, "/imgae a.png"),
                        "/imgae is no command; /help lists them"),
    "two files": ("qwen2_vl", lambda one, root: terminal._is_last(one, "/image a b"),
                  "/image a b names 2 files"),
    "thinking": ("qwen2", lambda one, root: Dialogue(one.answerer, sampling=one.sampling,
                                                     thinking=False),
                 "--no-thinking is for models whose chat template can ask for reasoning"),
    "top-p alone": ("qwen2", lambda one, root: Sampling(top_p=0.5), "give --temperature above 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_asked_is_said_in_a_sentence(what, answerers, shown):
    name, do, said = REFUSED[what]
    with pytest.raises(InputError) as told:
        do(dialogue(answerers(name)[1]), shown[0].parent)
    assert said in str(told.value) and "\n" not in str(told.value)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_answers_as_its_hf_directory_and_is_exported_once(
    answerers, tmp_path, capsys
):
    model_dir, answerer = answerers("qwen2_vl")
    checkpoint = tmp_path / "out" / "checkpoint" / "first"
    layout = ["--tp", "2", "--pp", "2", "--pp-layers", "1,3"]
    assert run(["convert", str(model_dir), str(checkpoint), *layout]) == 0
    told: list[str] = []
    exported = hf_directory(tmp_path / "out", say=told.append)
    assert exported.parent == checkpoint / ".hf" and "exported release" in told[0]
    weights = exported / "model.safetensors"
    first = weights.stat().st_mtime_ns
    for same in (tmp_path / "out", checkpoint, checkpoint / "release"):
        assert hf_directory(same, say=told.append) == exported
    assert weights.stat().st_mtime_ns == first
    assert all("exported before" in line for line in told[1:])
    said = "".join(dialogue(Answerer.from_hf_dir(exported)).ask("a?"))
    assert said == "".join(dialogue(answerer).ask("a?"))

    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    write_weights(other, seed=1)
    assert run(["convert", str(other), str(checkpoint), *layout, "--overwrite"]) == 0
    assert hf_directory(checkpoint, say=told.append) != exported
    capsys.readouterr()


@pytest.mark.parametrize("more", [{}, {"use_dora": True, "modules_to_save": ["ln_q"]}])
def test_a_model_with_an_adapter_answers_as_by_peft(more, answerers, tmp_path):
    model_dir, answerer = answerers("qwen2_vl")
    adapter, told = tmp_path / "adapter", []
    torch.manual_seed(0)
    model = peft.get_peft_model(
        AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32),
        peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj", "qkv"], lora_alpha=6, **more),
    )
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": "a?"}], return_dict=True,
                                           add_generation_prompt=True, return_tensors="pt")
    made = model.eval().generate(**inputs, max_new_tokens=NEW, do_sample=False)
    theirs, _ = answerer.text_of(made[0, inputs["input_ids"].shape[1] :].tolist())

    checkpoint = tmp_path / "mcore"
    assert run(["convert", str(model_dir), str(checkpoint), "--tp", "2"]) == 0
    for given in (model_dir, checkpoint):
        exported = hf_directory(given, adapter=adapter, say=told.append)
        assert exported.parent == adapter / ".hf" and told[-1].startswith("exported ")
        said = "".join(dialogue(Answerer.from_hf_dir(exported)).ask("a?"))
        assert said == theirs != "".join(dialogue(answerer).ask("a?"))
    assert hf_directory(given, adapter=adapter, say=told.append) == exported
    assert "exported before" in told[-1]
    with pytest.raises(InputError, match=r"mcore has no adapter_config\.json"):
        hf_directory(model_dir, adapter=checkpoint, say=print)


def test_an_export_goes_nowhere_else(model_dir, tmp_path, capsys):
    assert run(["convert", str(model_dir), str(tmp_path / "mcore")]) == 0
    capsys.readouterr()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="full holds something else than an export"):
        hf_directory(tmp_path / "mcore", export=tmp_path / "full", say=print)
    with pytest.raises(InputError, match="--export is for a Megatron-Core checkpoint"):
        hf_directory(model_dir, export=tmp_path / "new", say=print)
    assert hf_directory(tmp_path / "mcore", export=tmp_path / "new", say=print).name == "new"
