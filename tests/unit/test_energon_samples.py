"""Datasets that `energon prepare` made are read by their sample type, or refused before a start."""

import io
import json
import shutil
import subprocess
import sys
import tarfile

import pytest
import yaml
from mixed_data import write_video

from megatron_vl.data.conversation import BadEntry
from megatron_vl.data.dataset_dir import SAMPLE_TYPES, check_dataset
from megatron_vl.data.load.energon_samples import SERVED, conversation_of
from megatron_vl.errors import InputError


def test_what_a_dataset_may_name_is_what_is_read():
    assert {one.__name__ for one in SERVED} == set(SAMPLE_TYPES)
    for one in SERVED:
        assert set(SAMPLE_TYPES[one.__name__]) < set(one.__dataclass_fields__)


def said(turn):
    return [part.text or f"<{part.media}>" for part in turn.parts]


@pytest.fixture
def image(llava_dir):
    return next(llava_dir.rglob("*.png")).read_bytes()


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "a.mp4")
    return (tmp_path / "a.mp4").read_bytes()


KEYS = dict(__key__="0", __restore_key__=(), __subflavors__={})
CHOICES = dict(context="Which?", choices=["a cat", "a dog"])
READ = {  # type, its fields -> the question, the answer
    "a caption": ("CaptioningSample", dict(caption="a red circle"), ["<image>"], "a red circle"),
    "a question": ("VQASample", dict(context="What?", answers=["red", "blue"]),
                   ["<image>", "What?"], "red"),
    "one answer as text": ("VQASample", dict(context="What?", answers="red"),
                           ["<image>", "What?"], "red"),
    "a mark": ("VQASample", dict(context="Is it <image>\nred?", answers=["no"]),
               ["Is it ", "<image>", "red?"], "no"),
    "weights": ("VQASample", dict(context="What?", answers=["red", "blue"],
                                  answer_weights=[0.3, 0.7]), ["<image>", "What?"], "blue"),
    "a video": ("VidQASample", dict(context="When?", answers=["late"]),
                ["<video>", "When?"], "late"),
    "a video's mark": ("VidQASample", dict(context="<video>\nWhen?", answers=["late"]),
                       ["<video>", "When?"], "late"),
    "a video marked as LLaVA does": ("VidQASample", dict(context="<image>\nWhen?", answers=["x"]),
                                     ["<video>", "When?"], "x"),
    "choices": ("MultiChoiceVQASample", CHOICES | dict(correct_choice_idx=1),
                ["<image>", "Which?\nA. a cat\nB. a dog"], "B"),
    "a choice as text": ("MultiChoiceVQASample", CHOICES | dict(correct_choice_idx="0"),
                         ["<image>", "Which?\nA. a cat\nB. a dog"], "A"),
}


def sample_of(name, fields, image, video):
    one = next(one for one in SERVED if one.__name__ == name)
    media = {"video": video} if name == "VidQASample" else {"image": image}
    return one(**KEYS, **{**media, **fields})


@pytest.mark.parametrize(("name", "fields", "question", "answer"), READ.values(), ids=READ)
def test_each_type_is_read_as_it_means(name, fields, question, answer, image, video):
    one = conversation_of(sample_of(name, fields, image, video), "shard/0")
    user, assistant = one.turns
    assert (user.role, said(user)) == ("user", question)
    assert (assistant.role, said(assistant)) == ("assistant", [answer])
    (media,) = one.media
    assert one.read(media.files[0]) == (video if media.kind == "video" else image)
    if media.kind == "video":
        assert media.num_frames > 1 and media.fps > 0


NOT_READ = {
    "no answer": ("VQASample", dict(context="What?", answers=[]), InputError, "check the field"),
    "a number": ("CaptioningSample", dict(caption=3), InputError, "as image, caption; check"),
    "an image that is decoded": ("CaptioningSample", dict(caption="a", image=[[0]]), InputError,
                                 "is not an image's bytes"),
    "a choice of thousands of digits": (
        "MultiChoiceVQASample", CHOICES | dict(correct_choice_idx="1" * 5000),
        InputError, "correct_choice_idx; check"),
    "a choice that is not there": ("MultiChoiceVQASample", CHOICES | dict(correct_choice_idx=2),
                                   InputError, "correct_choice_idx; check"),
    "two marks": ("VQASample", dict(context="<image> or <image>?", answers=["a"]), BadEntry,
                  "it has the marks of image, image for one image"),
    "a video's mark for an image": ("VQASample", dict(context="<video>?", answers=["a"]), BadEntry,
                                    "it has the marks of video for one image"),
}


@pytest.mark.parametrize(("name", "fields", "error", "sentence"), NOT_READ.values(), ids=NOT_READ)
def test_fields_of_another_kind_are_named(name, fields, error, sentence, image, video):
    with pytest.raises(error, match=sentence.replace("?", r"\?")):
        conversation_of(sample_of(name, fields, image, video), "shard/0")


# ---- dataset.yaml ------------------------------------------------------------------------------


def named(name, *fields):
    return {"sample_type": {"__module__": "megatron.energon", "__class__": name},
            "field_map": dict.fromkeys(fields, "json")}


CONFIGS = {  # what dataset.yaml says -> what is said about it, nothing where it is taken
    **{name: (named(name, *fields), None) for name, fields in SAMPLE_TYPES.items()},
    "an older one": ({"__module__": "megatron.energon", "__class__": "VQAWebdataset",
                      "field_map": dict.fromkeys(SAMPLE_TYPES["VQASample"], "json")}, None),
    **{name: (named(name, "text"), f"names the sample type {name}, of which no question and answer")
       for name in ("InterleavedSample", "TextSample", "OCRSample", "ImageSample",
                    "MultiMixQASample", "NoSuchSample")},
    "no type": ({"field_map": {"image": "png"}}, "names the sample type None, of which"),
    "no field_map": ({"sample_type": named("VQASample")["sample_type"]},
                     "lacks image, context, answers, which a VQASample needs"),
    "a field left out": (named("VidQASample", "video", "answers"),
                         "lacks context, which a VidQASample needs"),
    "nothing": (None, "names the sample type None"),
}


@pytest.mark.parametrize(("config", "sentence"), CONFIGS.values(), ids=CONFIGS)
def test_a_sample_type_is_taken_or_refused_before_any_process_starts(
        config, sentence, vqa_dir, tmp_path):
    wds = shutil.copytree(vqa_dir, tmp_path / "wds")
    (wds / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(config))
    if sentence is None:
        assert check_dataset(wds, "train") > 0
        return
    with pytest.raises(InputError) as refused:
        check_dataset(wds, "train")
    assert sentence in str(refused.value) and str(refused.value).endswith(".")


def test_a_video_dataset_of_energons_own_is_read_to_its_pixels(video, tmp_path, hf_dir):
    """Made as a person makes it: `energon prepare ./`, then lint, which reads as training does."""
    from commands import megatron_vl

    wds = tmp_path / "wds"
    wds.mkdir()
    text = json.dumps({"question": "What happens?", "answers": ["it turns"]}).encode()
    with tarfile.open(wds / "0.tar", "w") as tar:
        for number in range(4):
            for name, data in ((f"{number}.mp4", video), (f"{number}.json", text)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    fields = {"video": "mp4", "context": "json[question]", "answers": "json[answers]"}
    subprocess.run(
        [sys.executable, "-m", "megatron.energon.cli.main", "prepare", wds, "--non-interactive",
         "--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0", "--sample-type",
         "VidQASample", "--field-map", json.dumps(fields)],
        check=True, stdout=subprocess.DEVNULL,
    )
    done = megatron_vl("lint", wds, "--model", hf_dir, "--seq-length", 2048,
                       "--out", tmp_path / "lint.html")
    assert done.code == 0 and "Traceback" not in done.text, done.text
