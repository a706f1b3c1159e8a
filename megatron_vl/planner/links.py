"""Seconds that ranks of a layout send one another; adjacent ranks share a node.

A collective of n ranks sends (n - 1)/n of its bytes from every rank, twice for an all-reduce. The
members of a node that gather, scatter or reduce send one another's bytes on, so that all their ways
to other nodes are used at once; where every rank has something for every other, as in the exchange
of tokens and heads, a rank sends what leaves the node by its own.
"""

from __future__ import annotations

from megatron_vl.planner.cards import Card
from megatron_vl.planner.microbatch import Microbatch
from megatron_vl.planner.work import Work
from megatron_vl.training.memory import FP32, ITEMSIZE, RankMemory
from megatron_vl.training.plan import Plan


class Links:
    """The collectives of a plan's layout."""

    def __init__(self, plan: Plan, card: Card, per_node: int) -> None:
        self.plan, self.layout, self.card, self.per_node = plan, plan.layout, card, per_node
        self.itemsize = ITEMSIZE[plan.config.model.dtype]

    def _sent(
        self, kind: str, nbytes: float, ranks: int, *, span: int, times: int = 1
    ) -> float:
        """Seconds of collectives of `ranks` ranks among `span` adjacent ones, of whole tensors of
        `nbytes` each."""
        if ranks == 1:
            return 0.0
        share = times * nbytes * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)
        return self.card.link_seconds(share, kind=kind, within_node=span <= self.per_node,
                                      messages=times, lanes=self._of_a_node(ranks, span))

    def _exchanged(self, nbytes: float, ranks: int, *, span: int, times: int = 1) -> float:
        """Seconds in which each of `ranks` ranks has sent its `nbytes` to all in equal parts."""
        if ranks == 1:
            return 0.0
        near = self._of_a_node(ranks, span)
        within, away = (times * nbytes * part / ranks for part in (near - 1, ranks - near))
        seconds = self.card.link_seconds(within, kind="all_to_all", within_node=True,
                                         messages=times)
        return max(seconds, self.card.link_seconds(away, kind="all_to_all", within_node=False,
                                                   messages=times) if away else 0.0)

    def _of_a_node(self, ranks: int, span: int) -> float:
        """Of `ranks` ranks among `span` adjacent ones, those in a node."""
        return min(ranks, max(1.0, self.per_node * ranks / span))

    def language_layer(self, batch: Microbatch) -> Work:
        """TP gathers and scatters a row, CP trades tokens for heads, EP sends tokens away."""
        layout, decoder, experts = self.layout, self.plan.spec.decoder, (
            self.plan.spec.decoder.experts)
        tokens = batch.tokens / layout.cp
        row = tokens * decoder.hidden_size * self.itemsize
        gathered, scattered = (self._sent(kind, row, layout.tp, span=layout.tp)
                               for kind in ("all_gather", "reduce_scatter"))
        heads = 2 * (decoder.num_attention_heads + decoder.num_query_groups) * decoder.head_dim
        cp = self._exchanged(tokens * heads / layout.tp * self.itemsize / 4, layout.cp,
                             span=layout.tp * layout.cp, times=4)  # q, k, v and the way back
        ep = 0.0
        if experts is not None:
            away = row / layout.tp * experts.per_token
            span = layout.expert_tp * layout.ep
            ep = self._exchanged(away, layout.ep, span=span, times=2)
            ep += sum(self._sent(kind, away * layout.expert_tp, layout.expert_tp, span=layout.tp)
                      for kind in ("all_gather", "reduce_scatter"))
        # Two gathers and two scatters; in backward the two inputs are gathered once more.
        around = 2 if experts is None else 1
        forward = around * (gathered + scattered) + cp + ep
        return Work(forward=forward, backward=forward + around * gathered)

    def vision_layer(self, batch: Microbatch) -> Work:
        """Two all-reduces forward and two backward, where TP cuts the tower."""
        layout = self.layout
        patches = batch.patches / layout.media_ranks
        nbytes = patches * self.plan.spec.vision.hidden_size * self.itemsize
        both = self._sent("all_reduce", nbytes, layout.vit_tp, span=layout.tp, times=2)
        return Work(forward=both, backward=both)

    def gathered_embeddings(self, batch: Microbatch) -> Work:
        """Embeddings of images that ranks have divided; their gradients are local."""
        layout = self.layout
        if not batch.patches:
            return Work()
        nbytes = batch.tokens * self.plan.spec.decoder.hidden_size * self.itemsize
        return Work(forward=self._sent("all_gather", nbytes, layout.media_ranks,
                                       span=layout.tp * layout.cp))

    def transfer(self, batch: Microbatch) -> float:
        """Hidden states, and features that travel with them, to the next stage."""
        tensors = 1 + self.plan.spec.travelling_features(self.plan.split)
        width = self.plan.spec.decoder.hidden_size * self.itemsize * tensors
        nbytes = batch.tokens / self.layout.row_parts * width
        rows = self.plan.config.batch.micro_batch_size
        nbytes = max(nbytes, rows * self.itemsize * self.plan.spec.travelling_states(
            self.plan.split, self.plan.row_length))
        return self.card.link_seconds(
            nbytes, kind="send", within_node=self.layout.world_size <= self.per_node)

    def shared(self, held: RankMemory) -> tuple[float, float]:
        """(sum of a step's gradients, all-gather of updated weights).

        Without the distributed optimizer every rank has all sums, and no weight is gathered.
        """
        layout, options = self.layout, self.plan.config.optimizer
        gradient = self.itemsize if options.grad_reduce_in_bf16 else FP32
        span = layout.world_size // layout.pp
        buffers = [one for chunk in held.chunks for one in chunk.buffers if one.numel]

        def sent(kind: str, itemsize: int) -> float:
            return sum(self._sent(kind, one.numel * itemsize, one.shares, span=span)
                       for one in buffers)

        if not options.use_distributed_optimizer:
            return sent("all_reduce", gradient), 0.0
        return sent("reduce_scatter", gradient), sent("all_gather", self.itemsize)

    def tied(self, held: RankMemory) -> float:
        """The sum of the two gradients of an embedding that is on two stages."""
        numbers = sum(one.numel for chunk in held.chunks for one in chunk.held
                      if one.tied_over_stages and one.trained)
        if not numbers:
            return 0.0
        return self._sent("all_reduce", numbers * FP32, 2, span=self.layout.world_size)
