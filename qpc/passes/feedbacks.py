"""The rotation and the error feedback of each weight, input by input: what its expected loss and its rounding both start from."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import networkx as nx  # type: ignore[import-untyped]
from torch import fx

from qpc.calibration import Samples
from qpc.ir.annotation import annotation, site_of
from qpc.ir.linear import stored_matrix
from qpc.ir.program import Program
from qpc.ir.values import representatives
from qpc.moments import MomentStream, SecondMoments
from qpc.plain_files import parse_json
from qpc.quant.feedback import Expected, Feedback, StackFeedback, row_deviations
from qpc.quant.hadamard import block_within
from qpc.quant.moment import filled_up
from qpc.quant.rotation import Rotation, seeded_generator
from qpc.quant.unfactored import Unfactored

KEPT_BYTES = 4 << 30
"""Feedback of so much memory waits from the allocation until the rounding; the rest is made again."""


@dataclass(frozen=True)
class Job:
    """A weight to pack: the nodes that apply it, the rotation of their input (None: it is rotated already), and the feedback for it.

    feedback: kept from before, or what it is to be made of.
    """

    key: "Key"
    sites: tuple[fx.Node, ...]
    rotation: Rotation | None
    feedback: Feedback | StackFeedback | Unfactored | None

    @property
    def weight(self) -> str:
        """Its name."""
        return self.key[0]


Key = tuple[str, str]
"""The name of a weight, and that of the site whose signs it has."""


@dataclass
class Known:
    """What was found of feedback before: of all of it what is expected, and as much of it as memory allows.

    matrices: whether feedback itself is of use to it.
    """

    matrices: ClassVar[bool] = True
    expected: dict[Key, Expected] = field(default_factory=dict)
    _kept: dict[Key, Feedback | StackFeedback] = field(default_factory=dict)

    def keep(self, key: Key, feedback: Feedback | StackFeedback | Expected) -> None:
        """Remember feedback, or what is expected of it."""
        self.expected[key] = Expected(feedback.share, feedback.damping)
        if isinstance(feedback, Expected):
            return
        distinct = {id(each): each.nbytes for each in (*self._kept.values(), feedback)}
        if sum(distinct.values()) <= KEPT_BYTES:
            self._kept[key] = feedback

    def take(self, key: Key) -> Feedback | StackFeedback | None:
        """The feedback, if it was kept; it is then forgotten."""
        return self._kept.pop(key, None)

    def fork(self) -> "Known":
        """The same, to be taken once more."""
        return Known(dict(self.expected), dict(self._kept))

    def to_json(self) -> str:
        """What is expected."""
        return json.dumps([[*key, found.share, found.damping] for key, found in self.expected.items()])

    @staticmethod
    def from_json(text: str) -> "Known":
        """Inverse of `to_json`. Raises `ValueError` or `TypeError` if the text is not that."""
        rows = parse_json(text)
        return Known({(str(weight), str(owner)): Expected(float(share), float(damping)) for weight, owner, share, damping in rows})


@dataclass(frozen=True)
class Feedbacks:
    """Jobs for all weights of some linears.

    Sites that read the same value, or apply the same weight, share one random sign vector, so any chosen grouping stays valid. The signs
    depend on the seed and on the name of the first site that shares them, on nothing else. Inputs that are rotated already stay as they
    are.

    samples: inputs on which the moments are taken; None: no feedback. Where they know the importance of positions, each weight has a moment
    and feedback of its own, else all that read one value share them. Each expert of a stack has its own. known: where feedback is taken
    from.
    """

    program: Program
    nodes: tuple[fx.Node, ...]
    samples: Samples | None
    seed: int = 0
    rotation_block: int | None = None
    known: Known = field(default_factory=Known)
    _rotations: dict[str, Rotation] = field(default_factory=dict)

    def stream(self, sequential: bool) -> MomentStream | None:
        """The samples at the beginning of the graph."""
        if self.samples is None:
            return None
        return MomentStream(
            self.program,
            self.samples.batches,
            self.samples.held_out,
            importance=self.samples.importance,
            held_out_importance=self.samples.held_out_importance,
            sequential=sequential,
        )

    def in_turn(self, moments: SecondMoments | None, done: Callable[[Key], bool] = lambda key: False) -> Iterator[list[Job]]:
        """The weights of one input after another, in the order in which the graph computes them.

        moments: where those come from; None: no feedback. done: says which weights need none any more.
        """
        signs = sign_owners(self.nodes)
        for weights in by_input(self.program, self.nodes, signs):
            site = site_of(weights[0][0])
            owner = signs[site.name]
            folded = site.weight in self.program.rotated
            if owner not in self._rotations and not folded:
                block = block_within(site.shape.in_features, self.rotation_block)
                drawn = Rotation.random(site.shape.in_features, seeded_generator(self.seed, owner), block)
                self._rotations[owner] = drawn.to(self.program.home(site.weight))
            rotation = None if folded else self._rotations[owner]
            jobs: list[Job] = []
            for sharing in weights:
                key = (site_of(sharing[0]).weight, owner)
                feedback = None
                if moments is not None and self.samples is not None and not done(key):
                    common = [] if self.samples.importance is not None or site_of(sharing[0]).experts else jobs
                    known = next((job.feedback for job in common if isinstance(job.feedback, Feedback | Unfactored)), None)
                    feedback = known or self._feedback(moments, sharing, rotation, key)
                jobs.append(Job(key, tuple(sharing), rotation, feedback))
            yield jobs

    def _feedback(
        self, source: SecondMoments, sharing: list[fx.Node], rotation: Rotation | None, key: Key
    ) -> Feedback | StackFeedback | Unfactored:
        expected = self.known.expected.get(key)
        damping = None if expected is None else expected.damping
        kept = self.known.take(key)
        if kept is not None:
            return kept
        if site_of(sharing[0]).experts is not None:
            return Unfactored(tuple(filled_up(source.moments_of_experts(sharing))), rotation, stacked=True)
        outputs = None if self.samples is None or self.samples.outputs is None else self.samples.outputs.get(key[0])
        if outputs is not None:
            outputs = outputs.scaled(row_deviations(stored_matrix(self.program, site_of(sharing[0]))))
        return Unfactored((source.moment(sharing),), rotation, damping=damping, gradients=outputs)


def sign_owners(nodes: Iterable[fx.Node]) -> dict[str, str]:
    """For each site the name of the first site whose signs it must share: by a common input value or a common weight, transitively."""
    links = nx.Graph()
    for node in nodes:
        site, group = site_of(node), annotation(node).group
        assert group is not None
        links.add_edge(("site", site.name), ("value", group.input))
        links.add_edge(("site", site.name), ("weight", site.weight))
    owners: dict[str, str] = {}
    order = {site_of(node).name: index for index, node in enumerate(nodes)}
    for component in nx.connected_components(links):
        names = sorted((name for kind, name in component if kind == "site"), key=order.__getitem__)
        owners.update(dict.fromkeys(names, names[0]))
    return owners


def by_input(program: Program, nodes: Iterable[fx.Node], signs: Mapping[str, str]) -> list[list[list[fx.Node]]]:
    """The sites of each weight, of all weights that are applied to the same values: in graph order of the first site of each."""
    same = representatives(program.graph)
    applied: dict[str, list[fx.Node]] = {}
    for node in nodes:
        applied.setdefault(site_of(node).weight, []).append(node)
    stages: dict[object, list[list[fx.Node]]] = {}
    for sharing in applied.values():
        values = tuple(same[node.all_input_nodes[0]] for node in sharing)
        stages.setdefault((signs[site_of(sharing[0]).name], values), []).append(sharing)
    return list(stages.values())
