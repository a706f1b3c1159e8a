"""Qwen-VL's own: its reference held against torch and transformers, its images, its config."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from commands import free_port, megatron_vl, shell
from commands import run as command
from PIL import Image
from qwen_vl_reference import as_finetune_does
from raw_entries import read as read_entry
from tiny_hf import read
from torch.nn import functional as F

from megatron_vl.cli.main import run
from megatron_vl.data.conversation import BadEntry, Part, Turn
from megatron_vl.data.encode.model import ModelEncoder
from megatron_vl.data.load.config import DataConfig
from megatron_vl.data.load.loader import build_train_loader
from megatron_vl.data.load.mixture import Mixture
from megatron_vl.errors import InputError
from megatron_vl.launch.torchrun import take_over
from megatron_vl.models import family, load_spec
from megatron_vl.models.common.tiny_tokenizer import read_ranks
from megatron_vl.models.media import BadMedia, MediaLimits, MediaSettings, StoredMedia
from megatron_vl.models.qwen_vl.positional_table import resized, sine_table
from megatron_vl.models.qwen_vl.reference import QwenVL, resize
from megatron_vl.models.registry import read_config_json

CLOSE = dict(rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def judge(resampler_model_dir):
    return QwenVL.from_pretrained(resampler_model_dir)


@pytest.fixture(scope="module")
def of_model(resampler_model_dir):
    return load_spec(resampler_model_dir)


# ---- the reference, part by part --------------------------------------------------------------


def test_its_decoder_is_transformers_qwen2(judge, resampler_model_dir, of_model):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    decoder = of_model.decoder
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=decoder.vocab_size, hidden_size=decoder.hidden_size,
        intermediate_size=decoder.ffn_hidden_size, num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_attention_heads,
        num_key_value_heads=decoder.num_attention_heads, rms_norm_eps=1e-6,
        rope_theta=decoder.rope_theta, tie_word_embeddings=False,
        max_position_embeddings=decoder.max_position_embeddings,
    )).eval()
    published, weights = read(resampler_model_dir), {}
    renamed = {"ln_1": "input_layernorm", "attn.c_proj": "self_attn.o_proj",
               "ln_2": "post_attention_layernorm", "mlp.w1": "mlp.up_proj",
               "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj"}
    for name, tensor in published.items():
        if not name.startswith("transformer.h."):
            continue
        layer, (part, leaf) = name.split(".")[2], name.split(".", 3)[3].rsplit(".", 1)
        new = f"model.layers.{layer}"
        if part == "attn.c_attn":
            for one, third in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"{new}.self_attn.{one}_proj.{leaf}"] = third
        else:
            weights[f"{new}.{renamed[part]}.{leaf}"] = tensor
    weights |= {"model.embed_tokens.weight": published["transformer.wte.weight"],
                "model.norm.weight": published["transformer.ln_f.weight"],
                "lm_head.weight": published["lm_head.weight"]}
    model.load_state_dict(weights)
    tokens = torch.randint(0, of_model.tokens.vision_start, (1, 37))
    torch.testing.assert_close(judge(tokens).logits, model(tokens).logits, **CLOSE)


def torch_attention(width: int, heads: int, weight, bias, out) -> torch.nn.MultiheadAttention:
    """torch's, of three blocks of rows q, k and v."""
    made = torch.nn.MultiheadAttention(width, heads)
    made.load_state_dict({"in_proj_weight": weight, "in_proj_bias": bias,
                          "out_proj.weight": out.weight, "out_proj.bias": out.bias})
    return made


def test_a_block_of_its_tower_is_torchs_attention_and_mlp(judge, of_model):
    block, vision = judge.transformer["visual"].transformer["resblocks"][0], of_model.vision

    def thirds(rows: torch.Tensor) -> torch.Tensor:
        """Published head by head."""
        by_head = rows.unflatten(0, (vision.num_heads, 3, vision.head_dim))
        return by_head.transpose(0, 1).flatten(0, 2)

    project = block.attn["in_proj"]
    attention = torch_attention(vision.hidden_size, vision.num_heads, thirds(project.weight),
                                thirds(project.bias), block.attn["out_proj"])
    x = torch.randn(vision.side**2, vision.hidden_size)
    normed = block.ln_1(x)
    expected = x + attention(normed, normed, normed)[0]
    mlp = torch.nn.Sequential(block.mlp["c_fc"], torch.nn.GELU(), block.mlp["c_proj"])
    expected = expected + mlp(block.ln_2(expected))
    torch.testing.assert_close(block(x), expected, **CLOSE)


def test_its_resampler_is_torchs_attention_with_positions_on_keys_alone(judge, of_model):
    pool, vision = judge.transformer["visual"].attn_pool, of_model.vision
    attention = torch_attention(vision.out_hidden_size, vision.resampler_heads,
                                pool.attn.in_proj_weight, pool.attn.in_proj_bias,
                                pool.attn.out_proj)
    x = torch.randn(vision.side**2, vision.hidden_size)
    value = pool.ln_kv(x @ pool.kv_proj.weight.T)
    table = pool.pos_embed.view(2, 2, -1).permute(2, 0, 1)[None]
    key = value + F.interpolate(table, size=(4, 4), mode="bicubic")[0].flatten(1).T
    expected = attention(pool.ln_q(pool.query) + pool.pos_embed, key, value)[0]
    torch.testing.assert_close(pool(x), expected, **CLOSE)


def test_its_tower_sees_a_whole_image_as_a_convolution_does(judge, of_model):
    visual, vision = judge.transformer["visual"], of_model.vision
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8))
    media = StoredMedia(kind="image", files=("0.png",), height=50, width=90)
    processor = family("qwen").processor(".", of_model)
    patches = processor.load(media, iter([image]))
    assert patches.shape == (16, processor.patch_dim) and processor.shape(media) == (1, 4, 4)
    assert processor.num_tokens((1, 4, 4)) == vision.num_queries
    # What torchvision's Resize, ToTensor and Normalize do of a PIL image.
    square = image.resize((56, 56), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(one)[:, None, None] for one in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    whole = F.conv2d(((pixels - mean) / std)[None], visual.conv1.weight, stride=14)
    ours = F.linear(patches, visual.conv1.weight.flatten(1))
    torch.testing.assert_close(ours, whole[0].flatten(1).T, **CLOSE)
    out = torch.empty_like(patches)
    assert processor.load(media, iter([image]), out) is out and torch.equal(out, patches)


# ---- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "side"), [(16, 32), (16, 4), (2, 4), (3, 3)])
def test_a_table_is_resized_as_torch_resizes_a_picture(stored, side):
    table = torch.randn(stored**2, 24)
    torch.testing.assert_close(resized(table, side), resize(table, side**2), **CLOSE)


def test_a_tiny_model_has_the_positions_that_are_published(resampler_model_dir):
    table = read(resampler_model_dir)["transformer.visual.attn_pool.pos_embed"]
    assert torch.equal(table, sine_table(2, 256))


def test_the_table_of_sines_is_that_of_masked_autoencoders():
    table, width, row, column = sine_table(16, 64), 64, 3, 5
    omega = 1 / 10000 ** (np.arange(width // 4) / (width // 4))
    halves = [np.concatenate([np.sin(at * omega), np.cos(at * omega)]) for at in (column, row)]
    np.testing.assert_allclose(table[16 * row + column], np.concatenate(halves), atol=1e-6)


def test_whatever_is_between_start_and_end_stands_for_an_image(of_model):
    start, end = of_model.tokens.vision_start, of_model.tokens.vision_end
    ids = torch.tensor([[1, start, 47, 0, end, 2, start, end + 1, 9, end],
                        [end + 1, 3, start, 5, end, 7, 7, 7, 7, 7]])
    assert of_model.tokens.places(ids).int().tolist() == [
        [0, 0, 1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]]


# ---- files ------------------------------------------------------------------------------------


def test_shards_of_pickles_are_read_as_data(resampler_model_dir, tmp_path):
    source, ours, home = tmp_path / "bin", tmp_path / "ours", tmp_path / "home"
    source.mkdir()
    weights = read(resampler_model_dir)
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, source / file)
        index |= dict.fromkeys(part, file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for path in resampler_model_dir.iterdir():
        if path.suffix != ".safetensors":
            (source / path.name).write_bytes(path.read_bytes())
    assert megatron_vl("convert", source, ours, "--tp", 2).code == 0
    assert megatron_vl("convert", ours, home, "--to", "hf", "--hf-config", source).code == 0
    done = megatron_vl("verify", source, home)
    assert done.code == 0, done.text
    assert {path.name for path in home.iterdir()} >= {"qwen.tiktoken", "tokenizer_config.json",
                                                      "generation_config.json"}
    assert not list(home.glob("*.bin"))


CONFIGS = [
    ({"visual": None}, "there is no visual section: this is Qwen, the language model of 2023"),
    ({"quantization_config": {"bits": 4}}, "its weights are quantised, and cannot be trained"),
    ({"kv_channels": 32}, "4 num_attention_heads of kv_channels 32 are 128 wide but hidden_size"),
    ({"no_bias": False}, "no_bias is False"),
    ({"intermediate_size": 193}, "intermediate_size is 193: it must be a multiple of 2"),
    ({"layer_norm_epsilon": None}, "layer_norm_epsilon is missing"),
    ({"visual": {"output_dim": 384}}, "vision tower ends 384 wide but the language model is 256"),
    ({"visual": {"output_dim": 64}}, "heads are 128 wide, so it must be a multiple of that"),
    ({"visual": {"n_queries": 5}}, "n_queries is 5; it must be a square"),
    ({"visual": {"image_size": 13}}, "image_size 13 holds no patch of 14 pixels"),
    ({"visual": {"image_start_id": None}}, "visual.image_start_id is missing"),
]


@pytest.mark.parametrize(("keys", "says"), CONFIGS, ids=[says for _, says in CONFIGS])
def test_a_config_that_is_not_understood_is_refused(keys, says, resampler_model_dir, tmp_path):
    config = read_config_json(resampler_model_dir)
    keys = dict(keys)
    if isinstance(visual := keys.get("visual"), dict):
        keys["visual"] = config["visual"] | visual
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(InputError) as error:
        load_spec(tmp_path)
    assert says in str(error.value)


def test_what_its_images_cannot_be_is_refused(of_model):
    with pytest.raises(InputError, match="image-max-pixels is 900, but qwen takes no videos"):
        family("qwen").processor(".", of_model, MediaLimits(image_max_pixels=900))
    processor = family("qwen").processor(".", of_model)
    media = StoredMedia(kind="image", files=("0.jpg",), height=20, width=20,
                        settings=MediaSettings(max_pixels=9))
    with pytest.raises(BadMedia, match="max_pixels"):
        processor.shape(media)


TINY = [
    (["--num-kv-heads", 2], "--num-kv-heads is 2; Qwen-VL has as many as --num-heads, 4"),
    (["--hidden-size", 64], "--hidden-size is 64; the heads of Qwen-VL's resampler are 128 wide"),
    (["--max-pixels", 3136], "--min-pixels is 200704 and --max-pixels 3136"),
    (["--vision-queries", 5], "visual n_queries is 5; it must be a square"),
]


@pytest.mark.parametrize(("options", "says"), TINY)
def test_a_tiny_model_that_no_qwen_vl_is_refused(options, says, tmp_path):
    done = megatron_vl("tiny", tmp_path / "out", "--model-type", "qwen_vl", *options)
    assert done.code == 2 and says in done.err, done.text


# ---- tokens and labels ------------------------------------------------------------------------

ENTRIES = [  # (turns as Qwen-VL's JSON has them, paths of their images)
    ([("user", "Picture 1: <img>/data/cafe\u0301/0 (1).jpg</img>\nWhere is the cat? 猫在哪里？"),
      ("assistant", "<ref>The cat</ref><box>(10,20),(300,400)</box>."),
      ("user", "Thanks\n"), ("assistant", "  You're welcome.\n\n")],
     ["/data/cafe\u0301/0 (1).jpg"]),
    ([("user", "Picture 1: <img>0.png</img>\nPicture 2: <img>1.png</img>\nCompare e\u0301."),
      ("assistant", "Equal."), ("user", "Picture 3: <img>0.png</img>\nAnd this?"),
      ("assistant", "<quad>(1,2),(3,4),(5,6),(7,8)</quad>")], ["0.png", "1.png", "0.png"]),
    ([("user", "No image."), ("assistant", "None.")], []),
]


OF_7B = {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "kv_channels": 128, "vocab_size": 151936, "visual": {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48,
        "mlp_ratio": 4.9231, "output_dim": 4096, "patch_size": 14, "width": 1664}}


@pytest.fixture(scope="module")
def published(resampler_model_dir, tmp_path_factory):
    """`ModelEncoder`, spec and directory of the published sizes and vocabulary, without weights."""
    out = tmp_path_factory.mktemp("published")
    ranks = read_ranks(151643)
    (out / "qwen.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    config = read_config_json(resampler_model_dir) | OF_7B
    (out / "config.json").write_text(json.dumps(config))
    spec = load_spec(out)
    return ModelEncoder.from_hf_dir(out, spec, family("qwen")), spec, out


@pytest.mark.parametrize(("said", "paths"), ENTRIES)
def test_tokens_and_labels_are_those_of_the_published_fine_tuning(said, paths, published):
    encoder, spec, _ = published
    entry = {"conversations": [{"from": role, "value": value} for role, value in said]}
    turns = read_entry("qwen_vl", entry).turns
    media = [StoredMedia(kind="image", files=("0.jpg",), height=9, width=9, path=path)
             for path in paths]
    tokens, labels, grids = encoder.encode(turns, media)
    ids, wanted = as_finetune_does(encoder.chat.prompt.encoding, said)
    assert tokens.tolist() == ids
    assert labels.tolist() == [*wanted[1:], -100]
    assert len(grids) == len(paths)
    assert int(spec.tokens.places(tokens).sum()) == 256 * len(paths)


def test_of_a_path_longer_than_its_places_they_hold_the_beginning(published):
    encoder, _, _ = published
    turns = read_entry("qwen_vl", {"conversations": [
        {"from": "user", "value": "<img>0.png</img>?"}, {"from": "assistant", "value": "a"}]}).turns
    tokens = [
        encoder.encode(turns, [StoredMedia(kind="image", files=("0.png",), height=9, width=9,
                                           path="a" * length)])[0].tolist()
        for length in (256, 300)
    ]
    assert tokens[0] == tokens[1] and tokens[0].count(ord("a")) >= 256


def test_the_published_scripts_flags_plan_the_true_size(published, tmp_path):
    (tmp_path / "said.json").write_text("[]")
    done = shell("examples/qwen_vl/finetune_ds.sh", tmp_path / "said.json", published[2],
                 tmp_path / "out", "--dry-run", "--", "--tp", 4, "--pp", 2, "--nproc-per-node", 8,
                 "--vit-pp-layers", "48,0", "--pp-layers", "4,28")
    assert done.code == 0, done.text
    assert "--fix_vit True -> --freeze-vit" in done.out
    assert "the model has 9,656,935,168 parameters; TP 4 x PP 2 ranks hold" in done.out, done.out


def test_of_the_processes_that_torchrun_starts_one_a_node_starts_the_ranks(published, tmp_path):
    (tmp_path / "said.json").write_text("[]")
    done = command(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port",
         free_port(), "examples/qwen_vl/finetune.py", "--model_name_or_path", published[2],
         "--data_path", tmp_path / "said.json", "--output_dir", tmp_path / "out", "--dry-run",
         "--", "--tp", 2])
    assert done.code == 0, done.text
    assert done.out.count("2 processes = 1 node x 2") == 1, done.out


def test_what_torchrun_set_is_gone_and_the_ranks_meet_beside_it():
    environ = {"LOCAL_RANK": "0", "RANK": "8", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8",
               "MASTER_ADDR": "a", "MASTER_PORT": "6001", "GROUP_RANK": "1", "HOME": "/h",
               "TORCHELASTIC_RUN_ID": "x"}
    others = environ | {"LOCAL_RANK": "1", "RANK": "9"}
    flags = take_over(environ)
    assert shlex.join(flags) == ("--nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr a "
                                 "--master-port 6002 --no-cluster-env")
    assert take_over(others) is None and environ == others == {"HOME": "/h"}


def test_ids_are_the_published_ones(published):
    encode = published[0].chat.prompt.encoding.encode
    assert encode("\nuserassistantsystem") and [encode(one) for one in (
        "\n", "user", "assistant", "system")] == [[198], [872], [77091], [8948]]
    assert published[0].chat.pad_token == 151643


def test_a_long_sample_is_cut_behind_its_images_and_never_within_one(
    resampler_model_dir, of_model, tmp_path
):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    picture = "Picture 1: <img>0.png</img>\n"
    entries = [
        {"id": "text", "conversations": [
            {"from": "user", "value": f"{picture}?"}, {"from": "assistant", "value": "a " * 99}]},
        {"id": "image", "conversations": [
            {"from": "user", "value": "b " * 9}, {"from": "assistant", "value": "c"},
            {"from": "user", "value": picture}, {"from": "assistant", "value": "d"}]},
    ]
    (tmp_path / "said.json").write_text(json.dumps(entries))
    assert run(["prepare", str(tmp_path / "said.json"), str(tmp_path / "wds"), "--format",
                "qwen_vl", "--split", "1,0,0", "--quiet"]) == 0
    model = {"hf_dir": resampler_model_dir, "spec": of_model, "family": family("qwen")}
    tokens = {}
    for entry in entries:
        turns = read_entry("qwen_vl", entry).turns
        media = [StoredMedia(kind="image", files=("0.png",), height=8, width=8, path="0.png")]
        tokens[entry["id"]], _, _ = ModelEncoder.from_hf_dir(**model).encode(turns, media)
    *_, last = of_model.tokens.places(tokens["image"]).nonzero().flatten().tolist()
    # Within the image, behind its last place, behind its end.
    for length, reasons in ((last, {"too long"}), (last + 1, {"too long"}), (last + 2, set())):
        config = DataConfig(
            train=Mixture.parse(str(tmp_path / "wds")), seq_length=length, num_workers=0,
            truncate_samples=True, packing_buffer_size=None, shuffle_buffer_size=0,
            max_skipped_samples=10,
        )
        found, skipped = {}, set()
        for batch, _ in zip(build_train_loader(config, **model), range(6), strict=False):
            here = batch.tokens[0, : batch.sample_lengths[0]]
            found[batch.sample_lengths[0] + batch.tokens_cut[0]] = here
            skipped |= {one.reason for one in batch.skipped}
            assert all("raise seq-length, or remove" in one.message for one in batch.skipped)
            assert batch.pixel_patches.shape == (16, of_model.vision.patch_dim)
            assert batch.loss_mask.sum() > 0
        whole = {len(one): one for one in tokens.values()}
        assert skipped == reasons and len(found) == 2 - len(reasons)
        assert all(torch.equal(one, whole[size][:length]) for size, one in found.items())


FILES = [
    (lambda path: path.unlink(), "qwen.tiktoken is missing"),
    (lambda path: path.write_bytes(b"\x89PNG\r\n"), "is no list of tokens and ranks"),
    (lambda path: path.write_text("IQ== 0\nIg== 2\n"), "lacks ranks, or has one twice"),
    (lambda path: path.write_text("IQ== 0\nIg== 1\n"), "so that <img> is token 216, but config"),
]


@pytest.mark.parametrize(("spoil", "says"), FILES)
def test_a_tokenizer_of_another_model_is_refused(spoil, says, resampler_model_dir, of_model,
                                                 tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes((resampler_model_dir / path.name).read_bytes())
    spoil(path)
    with pytest.raises(InputError, match=says):
        family("qwen").prompt(tmp_path, of_model)


def test_converting_warns_of_another_models_tokenizer(resampler_model_dir, tmp_path):
    source = shutil.copytree(resampler_model_dir, tmp_path / "source")
    (source / "qwen.tiktoken").write_text("IQ== 0\nIg== 1\n")
    done = megatron_vl("convert", source, tmp_path / "out", "--tp", 2)
    assert done.code == 0 and "so that <img> is token 216, but config" in done.err, done.text


def test_marks_in_a_text_are_refused(resampler_model_dir, of_model):
    encoder = ModelEncoder.from_hf_dir(resampler_model_dir, of_model, family("qwen"))
    turns = [Turn(role="user", parts=(Part(text="a </img> b"),)),
             Turn(role="assistant", parts=(Part(text="c"),))]
    with pytest.raises(BadEntry, match="turn 1 holds the reserved mark </img>"):
        encoder.encode(turns, [])
