"""Each rule against a plain reference, and there and back, on tensors of distinct numbers."""

import random

import pytest
import torch

from megatron_vl.errors import InputError
from megatron_vl.weights.rules import (
    QKV,
    ColumnParallel,
    Copy,
    FusedQKV,
    GateUp,
    RowParallel,
    Vocab,
    box,
)


def numbered(rule, dtype=torch.float32):
    """Every element of every published tensor has its own number."""
    tensors, start = {}, 1
    for key, shape in rule.published().items():
        count = torch.Size(shape).numel()
        tensors[key] = torch.arange(start, start + count, dtype=dtype).reshape(shape)
        start += count
    return tensors


def split_tensors(rule, tensors, tp):
    """Published tensors -> one Megatron-Core tensor a TP rank."""
    like, shards = tensors[next(iter(rule.published()))], []
    for rank in range(tp):
        shape, pieces = rule.pieces(tp, rank)
        shard = like.new_zeros(shape)
        for one in pieces:
            if one.key is not None:
                shard[box(one.at, one.shape)] = tensors[one.key][box(one.start, one.shape)]
        shards.append(shard)
    return shards


def join_tensors(rule, shards):
    """One Megatron-Core tensor a TP rank -> the published tensors; padding is dropped."""
    tensors = {key: shards[0].new_empty(shape) for key, shape in rule.published().items()}
    for rank, shard in enumerate(shards):
        for one in rule.pieces(len(shards), rank)[1]:
            if one.key is not None:
                tensors[one.key][box(one.start, one.shape)] = shard[box(one.at, one.shape)]
    return tensors


def qkv(heads, groups, head_dim, columns):
    return QKV(q="q", k="k", v="v", heads=heads, groups=groups, head_dim=head_dim,
               columns=columns)


@pytest.mark.parametrize("heads, groups, tp", [(4, 2, 1), (4, 2, 2), (8, 2, 2), (4, 4, 4),
                                               (4, 1, 1), (12, 2, 4), (16, 2, 8)])
@pytest.mark.parametrize("columns", [None, 3])
def test_qkv_is_interleaved_by_query_group(heads, groups, tp, columns):
    rule, width = qkv(heads, groups, 2, columns), 2
    tensors = numbered(rule)
    rows = []
    for group in range(groups):
        for head in range(heads // groups):
            at = (group * (heads // groups) + head) * width
            rows += list(tensors["q"][at : at + width])
        rows += list(tensors["k"][group * width : (group + 1) * width])
        rows += list(tensors["v"][group * width : (group + 1) * width])
    shards = split_tensors(rule, tensors, tp)
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(torch.cat(shards), torch.stack(rows))


@pytest.mark.parametrize("heads, groups, tp", [(4, 2, 4), (12, 2, 4), (28, 4, 4), (64, 8, 16)])
def test_megatron_core_finds_its_heads_in_the_shards(heads, groups, tp):
    """The steps of SelfAttention.get_query_key_value_tensors, on weights for activations."""
    width = 2
    rule = qkv(heads, groups, width, None)
    tensors = numbered(rule)
    shards = split_tensors(rule, tensors, tp)
    per_rank = heads // tp
    for rank in range(tp):
        if groups < tp:
            mixed = torch.cat(shards)  # gathered
            group = rank // (tp // groups)
            size = len(mixed) // groups
            mixed = mixed[group * size : (group + 1) * size]
            local_groups, in_group = 1, heads // groups
        else:
            mixed, local_groups = shards[rank], groups // tp
            in_group = heads // groups
        mixed = mixed.view(local_groups, (in_group + 2) * width)
        query, key, value = mixed.split([in_group * width, width, width], dim=1)
        query = query.reshape(-1, width)
        if groups < tp:
            part = rank % (tp // groups)
            query = query[part * per_rank : (part + 1) * per_rank]
        heads_here = range(rank * per_rank, (rank + 1) * per_rank)
        assert torch.equal(query, tensors["q"].view(heads, width)[list(heads_here)])
        groups_here = sorted({head * groups // heads for head in heads_here})
        assert torch.equal(key.reshape(-1, width), tensors["k"].view(groups, width)[groups_here])
        assert torch.equal(value.reshape(-1, width), tensors["v"].view(groups, width)[groups_here])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_vision_qkv_goes_from_three_blocks_to_one_row_of_blocks_a_head(tp):
    rule = FusedQKV(key="qkv", heads=4, head_dim=3, columns=5)
    whole = numbered(rule)["qkv"]
    q, k, v = whole.chunk(3)
    wanted = torch.cat([part[head * 3 : head * 3 + 3] for head in range(4) for part in (q, k, v)])
    assert torch.equal(torch.cat(split_tensors(rule, {"qkv": whole}, tp)), wanted)


def test_gate_and_up_are_cut_so_that_each_rank_has_its_part_of_both():
    rule = GateUp(gate="g", up="u", ffn=4, columns=2)
    tensors = numbered(rule)
    first, second = split_tensors(rule, tensors, 2)
    assert torch.equal(first, torch.cat([tensors["g"][:2], tensors["u"][:2]]))
    assert torch.equal(second, torch.cat([tensors["g"][2:], tensors["u"][2:]]))


def test_vocabulary_is_padded_with_zeros_and_padding_is_dropped_on_the_way_back():
    rule = Vocab(key="e", vocab=5, columns=2)
    tensors = numbered(rule)
    shards = split_tensors(rule, tensors, 4)
    assert [len(shard) for shard in shards] == [2, 2, 2, 2]
    assert torch.equal(torch.cat(shards)[:5], tensors["e"])
    assert not torch.cat(shards)[5:].any()
    assert torch.equal(join_tensors(rule, shards)["e"], tensors["e"])


def test_fewer_stored_rows_than_the_vocabulary_are_refused():
    with pytest.raises(InputError, match="vocab_size is 5"):
        Vocab(key="e", vocab=5, columns=2, padded=4).pieces(2, 0)


def random_rule(draw: random.Random):
    tp = draw.choice([1, 2, 4, 8])
    groups = draw.choice([1, 2, 4, 8])
    heads, dim = max(groups, tp) * draw.choice([1, 3]), 2 * draw.choice([1, 4]) * tp
    columns = draw.choice([None, 1, 7])
    width = tp * draw.randint(1, 5)
    return draw.choice([
        (qkv(heads - heads % groups, groups, dim, columns), tp),
        (FusedQKV(key="f", heads=heads, head_dim=dim, columns=columns), tp),
        (GateUp(gate="g", up="u", ffn=width, columns=3), tp),
        (Vocab(key="e", vocab=draw.randint(1, 40), columns=3), tp),
        (ColumnParallel(key="c", shape=(width, 3)), tp),
        (RowParallel(key="r", shape=(3, width)), tp),
        (Copy(key="o", shape=(4, 3, 2, 2, 2)), tp),
    ])


@pytest.mark.parametrize("seed", range(60))
def test_every_rule_round_trips_and_writes_each_element_once(seed):
    rule, tp = random_rule(random.Random(seed))
    tensors = numbered(rule, torch.float64)
    shards = split_tensors(rule, tensors, tp)
    back = join_tensors(rule, shards)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(back[key], tensor)
    for rank in range(tp):
        shape, pieces = rule.pieces(tp, rank)
        touched = torch.zeros(shape)
        for piece in pieces:
            ends = zip(piece.at, piece.shape, strict=True)
            touched[tuple(slice(a, a + n) for a, n in ends)] += 1
        assert (touched == 1).all()


@pytest.mark.parametrize("rule", [
    ColumnParallel(key="c", shape=(6, 2)), RowParallel(key="r", shape=(2, 6)),
    GateUp(gate="g", up="u", ffn=6, columns=2),
])
def test_tensor_parallelism_that_does_not_divide_is_refused_by_name(rule):
    with pytest.raises(InputError, match="TP 4 does not divide the 6 of"):
        rule.pieces(4, 0)
