"""Is each adapter really served? Found out before anything is scored, by what the models say to a few probes.

A fingerprint is the log-probabilities of the likeliest first tokens for each probe (or, where an endpoint gives none,
the first words of its answers). Four things stop the run: an adapter whose fingerprint is the base model's, two
different adapters with one fingerprint, an adapter that does not answer as its stage recorded after training (or
another one does so better), and an adapter that is farther from its own earlier fingerprint than another one is. The
last needs an earlier evaluation; its fingerprints are kept in RUN_DIR/identity.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swift_cl.errors import RunFailure
from swift_cl.evaluation.client import Endpoint, Generation
from swift_cl.evaluation.faults import QuestionFailed
from swift_cl.evaluation.pictures import Message, identified
from swift_cl.evaluation.plan import Target
from swift_cl.io import read_json, sha256_json, write_json
from swift_cl.serving.adapters import is_all_zero, stage_adapter
from swift_cl.stages import WEIGHTS

IDENTITY_FILE = "identity.json"
IDENTITY_SCHEMA = 1
PROBES = 3
TEXT_TOKENS = 32
SAME = 1e-6
"""Nats; below this two fingerprints are one. Raised to twice the difference between two asks of the same model."""
SUSPICIOUS = 1e-2
"""Nats; a fingerprint this close to its earlier one is not suspected of being another adapter's."""
FAR = 1.0
"""Nats; farther from what its stage recorded after training, an answer is of other weights, whatever the precision."""
WAY_OUT = "if they are known to be right, pass --no_identity_check"

Fingerprint = list[dict[str, float]]
"""For each probe, log-probabilities by token; in text mode the answer's text with 0.0."""


def distance(one: Fingerprint, other: Fingerprint) -> float:
    """Largest difference of a token's log-probability; a token missing on one side is below all that side lists."""
    largest = 0.0
    for a, b in zip(one, other, strict=True):
        floor_a, floor_b = min(a.values()), min(b.values())
        for token in a.keys() | b.keys():
            if token in a and token in b:
                gap = abs(a[token] - b[token])
            else:
                gap = a[token] - floor_b if token in a else b[token] - floor_a
                gap = max(gap, 0.0) if len(a) > 1 and len(b) > 1 else float("inf")
            largest = max(largest, gap)
    return largest


class IdentityCheck:
    """Collects fingerprints, server by server, and raises at the first that cannot be right."""

    def __init__(self, probes: Sequence[Sequence[Message]], backend: str, files: Sequence[Path]) -> None:
        self.probes, self.files = probes, files
        asked = [[identified(message) for message in probe] for probe in probes]
        self._group = f"{backend} {sha256_json(asked)[:16]}"
        self._seen: list[tuple[Target, Fingerprint]] = []
        self._noise = SAME

    def fingerprint(self, endpoint: Endpoint, served: str) -> Fingerprint:
        """What a model says to the probes."""
        found: Fingerprint = []
        for probe in self.probes:
            logprobs = endpoint.first_logprobs(served, probe)
            if logprobs is None:
                try:
                    logprobs = {endpoint.ask(served, probe, Generation(max_tokens=TEXT_TOKENS)).text: 0.0}
                except QuestionFailed as failure:
                    raise RunFailure(f"{endpoint.base_url}: the probe of {served!r} failed: {failure}") from None
            found.append(logprobs)
        return found

    def check(self, endpoint: Endpoint, targets: Sequence[tuple[Target, str]]) -> None:
        """Ask every (target, served name) of one server; the base model first.

        Raises:
            RunFailure: a name answers with other weights than its own.
        """
        for target, served in targets:
            mine = self.fingerprint(endpoint, served)
            if target.stage is None:
                self._noise = max(self._noise, 2 * distance(mine, self.fingerprint(endpoint, served)))
            for other, theirs in self._seen:
                if other.weights != target.weights and distance(mine, theirs) <= self._noise:
                    self._refuse_unless_equal(endpoint, target, other)
            self._seen.append((target, mine))
        self._compare_with_training(endpoint, targets)
        self._compare_with_earlier(endpoint)

    def _refuse_unless_equal(self, endpoint: Endpoint, target: Target, other: Target) -> None:
        pair = [item for item in (target, other) if item.stage is not None]
        if len(pair) == 2 and _same_tensors(pair[0], pair[1]):
            return
        if all(item.stage.weights_sha256 and is_all_zero(stage_adapter(item.stage)) for item in pair if item.stage):
            return  # an adapter that was not trained at all is the base model
        what = "the base model" if other.stage is None else f"{other.served!r}"
        raise RunFailure(
            f"{endpoint.base_url}: {target.served!r} answers exactly as {what} does, so the endpoint does not really "
            f"serve both; {WAY_OUT}"
        )

    def _compare_with_training(self, endpoint: Endpoint, targets: Sequence[tuple[Target, str]]) -> None:
        """Each adapter must answer its stage's probe as it did after training, and better so than any other does."""
        for target, served in targets:
            probe = target.stage.probe if target.stage is not None else None
            gap = None if probe is None else _gap(endpoint, served, probe)
            if probe is None or gap is None or gap <= max(SUSPICIOUS, self._noise):
                continue
            off = f"does not answer as its stage did after training ({gap:.2g} nats off)"
            what = f"{endpoint.base_url}: {served!r} {off}"
            others = [name for other, name in targets if other.weights != target.weights]
            gaps = [(theirs, name) for name in others if (theirs := _gap(endpoint, name, probe)) is not None]
            nearest = min(gaps, default=(gap, served))
            if nearest[0] < gap:
                raise RunFailure(f"{what}, {nearest[1]!r} rather does; {WAY_OUT}")
            if gap > FAR:
                raise RunFailure(f"{what}; {WAY_OUT}")

    def _compare_with_earlier(self, endpoint: Endpoint) -> None:
        for file in self.files:
            earlier = _read(file).get(self._group, {})
            for target, mine in self._seen:
                before = earlier.get(target.weights)
                if before is None or distance(mine, before) <= max(SUSPICIOUS, self._noise):
                    continue
                nearest, _ = min(self._seen, key=lambda item: distance(item[1], before))
                if nearest.weights != target.weights:
                    raise RunFailure(
                        f"{endpoint.base_url}: {target.served!r} does not answer as it did when it was evaluated first "
                        f"({file}), {nearest.served!r} does; {WAY_OUT}"
                    )

    def save(self) -> None:
        """Keep the fingerprints of this evaluation that are not on file yet."""
        for file in self.files:
            groups = _read(file)
            kept = groups.setdefault(self._group, {})
            for target, mine in self._seen:
                kept.setdefault(target.weights, mine)
            write_json(file, {"schema": IDENTITY_SCHEMA, "fingerprints": groups})


def _gap(endpoint: Endpoint, served: str, probe: Mapping[str, Any]) -> float | None:
    """Nats between a recorded probe and a served model's answer to it; None where no log-probabilities are given."""
    found = endpoint.first_logprobs(served, probe["messages"])
    return None if found is None else distance([found], [probe["logprobs"]])


def _read(file: Path) -> dict[str, dict[str, Fingerprint]]:
    if not file.is_file():
        return {}
    value: Any = read_json(file)
    found: dict[str, dict[str, Fingerprint]] = value["fingerprints"] if value.get("schema") == IDENTITY_SCHEMA else {}
    return found


def _same_tensors(one: Target, other: Target) -> bool:
    """Whether two adapter files hold the same numbers though their bytes differ."""
    import numpy as np
    from safetensors.numpy import load_file

    assert one.stage is not None
    assert other.stage is not None
    if one.stage.weights_sha256 is None or other.stage.weights_sha256 is None:
        return False
    a, b = (load_file(stage.weights_dir / WEIGHTS) for stage in (one.stage, other.stage))
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
