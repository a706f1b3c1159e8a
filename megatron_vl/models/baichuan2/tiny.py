"""A tiny Baichuan2. Its SentencePiece model is trained on a page of text, with the true ids."""

from __future__ import annotations

import io
import math

from megatron_vl.errors import InputError
from megatron_vl.models.baichuan2.tokenizer import ASSISTANT, USER
from megatron_vl.models.tiny import TinySizes

RESERVED = [  # from id 3 on, after <unk>, <s> and </s>
    f"<reserved_{number - 89 if number >= 89 else number + 200}>"
    for number in range(3, ASSISTANT + 1)
]
PIECES = 1000
TEXT = """
The river was wide and slow where it met the sea, and the boats came home with the evening tide.
Every morning the teacher wrote a question on the board, and the children answered it one by one.
How many apples are there? There are twelve apples in the basket and seven more on the table.
What is the capital of France? The capital of France is Paris, a large city on the river Seine.
She opened the window, looked at the rain for a while, and said that the garden needed the water.
If the train is late, we will wait at the station and drink tea until it arrives from the north.
A good answer is short and clear: it says what is known, and it says what is not known as well.
Write a function that adds two numbers, returns the sum, and prints an error when one is missing.
The mountain is high and the path is steep; take bread, water, a warm coat and a map with you.
He counted from one to ten, 1 2 3 4 5 6 7 8 9 10, and began again because he had lost his place.
My name is Anna. I live in a small house near the forest with my brother, two cats and a dog.
Please translate this sentence into Chinese, and explain every word that you have chosen for it.
今天天气很好，我们一起去公园散步吧。请问你叫什么名字？我叫小明，今年十二岁，住在北京。
中国的首都是北京，法国的首都是巴黎。请用三句话介绍一下你的家乡，并说明你为什么喜欢它。
一加一等于二，二加三等于五，十减四等于六。请写出一个故事，故事里有一条河、一座山和一只猫。
老师每天早上在黑板上写一个问题，学生们一个一个地回答。好的回答应该简短、清楚、准确。
"""


def files(sizes: TinySizes) -> dict[str, object]:
    """The files of its directory, without weights.

    Raises:
        InputError: heads that share keys and values, which it has none of.
    """
    if sizes.num_kv_heads not in (TinySizes().num_kv_heads, sizes.num_heads):
        raise InputError(
            f"--num-kv-heads is {sizes.num_kv_heads}, but every head of Baichuan2 has its own key "
            f"and value; leave it out."
        )
    return {
        "config.json": {
            "architectures": ["BaichuanForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": sizes.hidden_size,
            "initializer_range": sizes.init_std,
            "intermediate_size": sizes.ffn_size,
            "max_position_embeddings": sizes.max_positions,
            "model_max_length": sizes.max_positions,
            "model_type": "baichuan",
            "num_attention_heads": sizes.num_heads,
            "num_hidden_layers": sizes.num_layers,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False,
            "torch_dtype": sizes.dtype,
            "use_cache": True,
            "vocab_size": math.ceil(PIECES / 128) * 128,
            "z_loss_weight": 0,
        },
        "generation_config.json": {
            "assistant_token_id": ASSISTANT, "bos_token_id": 1, "do_sample": False,
            "eos_token_id": 2, "pad_token_id": 0, "user_token_id": USER,
        },
        "tokenizer_config.json": {
            "add_bos_token": False, "add_eos_token": False, "bos_token": "<s>",
            "clean_up_tokenization_spaces": False, "eos_token": "</s>",
            "model_max_length": sizes.max_positions, "pad_token": "<unk>",
            "tokenizer_class": "BaichuanTokenizer", "unk_token": "<unk>",
        },
        "tokenizer.model": trained_pieces(),
    }


def trained_pieces(*, add_dummy_prefix: bool = False) -> bytes:
    """A SentencePiece model of TEXT, trained as Baichuan2's own was."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.strip().splitlines()), model_writer=model, model_type="bpe",
        vocab_size=PIECES, user_defined_symbols=RESERVED, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2,
    )
    return model.getvalue()
