"""Every supervised answer of datasets, asked for with the true turns before it, and scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from megatron_vl.ask.answerer import Answerer, Question, Sampling
from megatron_vl.ask.metrics import METRICS, answer_in
from megatron_vl.ask.record import Answered, Record
from megatron_vl.ask.samples import Dataset, asked_turns, chosen
from megatron_vl.data.conversation import BadEntry
from megatron_vl.models.media import BadMedia

_WINDOW = 16  # batches whose questions are sorted by length together


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What is asked of whom, and how."""

    answerer: Answerer
    metric: str  # one of METRICS
    sampling: Sampling
    thinking: bool = False
    limit: int | None = None  # samples of each dataset, drawn at random; None: all
    seed: int = 0  # of that draw
    batch_size: int = 32  # questions
    progress: bool = True

    def run(self, datasets: Sequence[Dataset], record: Record) -> list[Answered]:
        """Asks what `record` lacks, and adds it; all answers to the datasets, in their order."""
        tasks = [(one, number) for one in datasets for number in chosen(one, self.limit, self.seed)]
        size, keys = self.batch_size * _WINDOW, []
        with tqdm(total=len(tasks), unit="sample", mininterval=1, disable=not self.progress) as bar:
            for start in range(0, len(tasks), size):
                window = tasks[start : start + size]
                made = [one for dataset, number in window for one in self._asked(dataset, number)]
                keys += [one.key for one, _ in made]
                self._add(record, [one for one, question in made if question is None])
                # Of a rerun too: batches are the same wherever the last one ended.
                asked = sorted((one for one in made if one[1] is not None),
                               key=lambda one: len(one[1].tokens))
                for first in range(0, len(asked), self.batch_size):
                    batch = asked[first : first + self.batch_size]
                    self._add(record, self._answered(
                        [one for one in batch if one[0].key not in record.answers]
                    ))
                    done = min(first + self.batch_size, len(asked)) * len(window) // len(asked)
                    bar.update(start + done - bar.n)
                bar.update(start + len(window) - bar.n)
        return [record.answers[key] for key in keys]

    @staticmethod
    def _add(record: Record, answered: Sequence[Answered]) -> None:
        record.add(one for one in answered if one.key not in record.answers)

    def _asked(
        self, dataset: Dataset, number: int
    ) -> Iterator[tuple[Answered, Question | None]]:
        """The questions of one sample, encoded; None of one that cannot be asked."""
        of = Answered(dataset=dataset.name, number=number, sample=dataset.key(number), turn=-1)
        encoder = self.answerer.encoder
        try:
            sample = dataset.sample(number)
        except (BadEntry, BadMedia) as error:
            yield _refused(of, error), None
            return
        for turn, before, media in asked_turns(sample):
            one = replace(of, turn=turn, groups=sample.groups)
            try:
                if sample.turns[turn].calls:
                    raise BadEntry("not served", "its answer calls a function, which is not scored")
                one = replace(
                    one, question=encoder.written(before, media),
                    expected=encoder.written(sample.turns[: turn + 1], media),
                )
                question = self.answerer.question(
                    before, media, sample.read, sample.tools, thinking=self._thinking,
                    max_new_tokens=self.sampling.max_new_tokens,
                )
            except (BadEntry, BadMedia) as error:
                yield _refused(one, error), None
            else:
                yield one, question

    @property
    def _thinking(self) -> bool | None:
        return self.thinking if self.answerer.encoder.chat.thinks else None

    def _answered(self, asked: Sequence[tuple[Answered, Question]]) -> list[Answered]:
        """A batch, answered and scored."""
        done, left = [], []
        for one, question in asked:
            try:
                left.append((one, self.answerer.decoded(question)))
            except BadMedia as error:
                done.append(_refused(one, error))
        if left:
            made = self.answerer.answers([question for _, question in left], self.sampling)
            for (one, _), (text, is_whole) in zip(left, made, strict=True):
                score = METRICS[self.metric](answer_in(text), answer_in(one.expected))
                done.append(replace(one, answer=text, is_whole=is_whole, score=score))
        return done


def _refused(one: Answered, error: BadEntry | BadMedia) -> Answered:
    return replace(one, refused=getattr(error, "reason", "unusable media"), message=str(error))
