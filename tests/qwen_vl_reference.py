"""The tokens and labels of Qwen-VL's published fine-tuning script, written out."""

from __future__ import annotations

import unicodedata


def as_finetune_does(tokenizer, conversation, span: int = 256) -> tuple[list[int], list[int]]:
    """`preprocess` of the published finetune.py, and its tokenizer's images: ids and labels."""
    ids_of, decode = tokenizer._special_tokens, tokenizer.decode_single_token_bytes

    def encode(text: str) -> list[int]:
        found = tokenizer.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        out, inside = [], None
        for one in found:
            if one == ids_of["<img>"]:
                inside = b""
            elif one == ids_of["</img>"]:
                out += [*inside, *[ids_of["<imgpad>"]] * (span - len(inside))]
                inside = None
            elif inside is not None:
                inside += decode(one)
                continue
            out.append(one)
        return out

    start, end = ids_of["<|im_start|>"], ids_of["<|im_end|>"]
    (line,), ignore = tokenizer.encode("\n"), -100
    system = [start, *encode("system"), line, *encode("You are a helpful assistant."), end, line]
    ids, labels = list(system), [start, *[ignore] * (len(system) - 3), end, line]
    for role, value in conversation:
        head = encode(f"<|im_start|>{role}")
        one = [*head, line, *encode(value), end, line]
        ids += one
        if role == "user":
            labels += [start, *[ignore] * (len(one) - 3), end, line]
        else:
            labels += [start, *[ignore] * len(head), *one[len(head) + 1 : -2], end, line]
    return ids, labels
