"""The loop: plans are proposed, generated with and corrected until what was asked is met on prompts that the search never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from diffusers_accel.evals.generate import Prompt
from diffusers_accel.evals.report import Report
from diffusers_accel.forwards import Forwards
from diffusers_accel.plan import Plan
from diffusers_accel.search.assignment import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.joint import Expected
from diffusers_accel.search.profile import Profile
from diffusers_accel.search.reach import OutOfReach
from diffusers_accel.search.steps_alone import StepsAlone
from diffusers_accel.tune.goal import Goal
from diffusers_accel.tune.lab import Lab, row_of, value_of
from diffusers_accel.tune.model import NOTHING, Attempt, Model, computed
from diffusers_accel.tune.propose import fastest_within, first_of, proposals
from diffusers_accel.tune.tuned import Proof

TOLERANCE = 0.03  # share by which a measured speed may differ from the one that was asked for
ROUNDS = 4  # of trials on calibration prompts
BREADTH = 3  # plans a round
CHECKS = 3  # times that validation may send a plan back
FIRST_SPEEDUP = 1.5  # that is tried where a quality is asked for and nothing is known yet
CLOSE = 0.05  # share by which a loss may differ from the one that was asked for, before validation decides
MOST_ALONE = 16  # choices of steps that are tried alone
SURE = 1.0  # dB: an interval of PSNR of more than that to each side cannot tell


@dataclass(frozen=True)
class Prompts:
    """What each part of a tuning may look at.

    Args:
        trial: corrects the model; may be those of the search.
        validation: decides whether a plan is taken.
        held_out: read once, at the end; where there are none, validation is the last word.
    """

    trial: Sequence[Prompt]
    validation: Sequence[Prompt]
    held_out: Sequence[Prompt] = ()


class Tuning:
    """One tuning.

    Args:
        profile: what the search measured.
        lab: makes clips.
        goal: what is asked; a number of ms per step is a speed-up already.
        prompts: see `Prompts`.
        dense_steps: of the search.
        correct: plans subtract each head's mean error.
        say: told what is tried and what came of it, a line each.
    """

    def __init__(
        self,
        profile: Profile,
        lab: Lab,
        goal: Goal,
        prompts: Prompts,
        dense_steps: float = 0.0,
        correct: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._profile, self._lab, self._goal, self._prompts = profile, lab, goal, prompts
        self._joint, self._say = profile.joint(dense_steps), say
        self._correct = correct
        self._history: list[Attempt] = []
        self._loss = 0.0 if goal.is_speed else goal.loss(goal.value)  # that trials aim at
        self._alone = StepsAlone(self._joint, partial(lab.step_error, prompts=prompts.trial), MOST_ALONE, say)

    def run(self) -> tuple[Plan, Report, Proof]:
        """The plan, and the report and the numbers that decided."""
        best, judged = self._trials(), []
        for check in range(1, CHECKS + 1):
            plan = self._plan(best)
            report = self._lab.compare({"plan": plan}, self._prompts.validation, not self._prompts.held_out)
            proof = proof_of(report, self._goal, "plan")
            self._say(f"validation {check}: {_seen(self._goal, proof.speedup, proof.value)} on {_clips(proof)}")
            judged.append((plan, report, proof))
            again = self._again(best, proof) if check < CHECKS else None
            if again is None:
                break
            best = again
        plan, report, proof = max(judged, key=lambda each: _merit(self._goal, each[2]))
        if self._prompts.held_out:
            report = self._lab.compare({"plan": plan}, self._prompts.held_out, True)
            proof = proof_of(report, self._goal, "plan")
            self._say(f"held out: {_seen(self._goal, proof.speedup, proof.value)} on {_clips(proof)}")
        return plan, report, proof

    def _trials(self) -> Assignment:
        """The plan that the trials recommend."""
        ranked = first_of(self._proposals(NOTHING), BREADTH)
        for number in range(1, ROUNDS + 1):
            some = ranked[:BREADTH]
            tried = self._try([self._joint.assignment(each) for each in some], number)
            self._history += tried
            try:
                ranked = self._proposals(Model.of(self._history, self._goal))
            except OutOfReach as reason:  # as it turns out: the best that there is goes on
                self._say(str(reason))
                return self._closest()
            best = self._joint.assignment(ranked[0])
            if self._settled(best, tried):
                break
        return best

    def _proposals(self, model: Model) -> list[Expected]:
        """What to try next, the best first. The choices of steps among the first of them are tried alone before."""
        return self._alone.settle(lambda enough: proposals(self._joint, self._speedup(model), model, enough), BREADTH)

    def _speedup(self, model: Model) -> float:
        """That a plan has to have, or may have."""
        if self._goal.is_speed:
            return self._goal.value
        return FIRST_SPEEDUP if model is NOTHING else fastest_within(self._joint, self._loss, model)

    def _closest(self) -> Assignment:
        """Of what was tried the plan that comes closest to the goal."""
        if self._goal.is_speed:
            return max(self._history, key=lambda each: each.speedup).assignment
        return min(self._history, key=lambda each: self._goal.loss(each.value)).assignment

    def _settled(self, best: Assignment, tried: Sequence[Attempt]) -> bool:
        """Whether the plan that is recommended now was just tried, and was what is asked."""
        same = [each for each in tried if _forwards(each.assignment) == _forwards(best)]
        if not same:
            return False
        if self._goal.is_speed:
            return abs(same[0].speedup / self._goal.value - 1) <= TOLERANCE / 2
        return abs(self._goal.loss(same[0].value) / self._loss - 1) <= CLOSE

    def _try(self, some: Sequence[Assignment], number: int) -> list[Attempt]:
        names = {_name(each): each for each in some}
        report = self._lab.compare({name: self._plan(each) for name, each in names.items()}, self._prompts.trial, False)
        tried = []
        for name, each in names.items():
            seen = Attempt(
                each,
                value_of(report, "speedup", name),
                value_of(report, "psnr", name),
                value_of(report, self._goal.metric, name),
            )
            self._say(f"trial {number}: {name}: {_seen(self._goal, seen.speedup, seen.value)}")
            tried.append(seen)
        return tried

    def _again(self, best: Assignment, proof: Proof) -> Assignment | None:
        """What to validate next; None where this plan stays, because it is what was asked or there is no better one."""
        try:
            return self._sent_back(best, proof)
        except OutOfReach as reason:
            self._say(str(reason))
            return None

    def _sent_back(self, best: Assignment, proof: Proof) -> Assignment | None:
        """What to validate next, where this plan is not what was asked; None where it is."""
        model = Model.of(self._history, self._goal)
        if self._goal.is_speed:
            if abs(proof.speedup / self._goal.value - 1) <= TOLERANCE:
                return None
            same = computed(best.steps)
            model = replace(model, slow={**model.slow, same: best.speedup / proof.speedup})
            ranked = self._proposals(model)
            return self._joint.assignment(next((each for each in ranked if each.computed == same), ranked[0]))
        wanted, seen = self._goal.loss(self._goal.value), self._goal.loss(_bound(proof, self._goal))
        if wanted * 10 ** (-SURE / 10) <= seen <= wanted:
            return None
        self._loss *= wanted * 10 ** (-0.3 * SURE / 10) / seen
        return self._joint.assignment(self._proposals(model)[0])

    def _plan(self, assignment: Assignment) -> Plan:
        return self._profile.plan(assignment, Budget.speedup(max(1.0, assignment.speedup)), self._correct)


def proof_of(report: Report, goal: Goal, subject: str) -> Proof:
    """The numbers of a subject."""
    spread = row_of(report, goal.metric, subject).spread
    speedup = value_of(report, "speedup", subject)
    return Proof(speedup, value_of(report, goal.metric, subject), spread, len(report.clips))


def verdict(goal: Goal, proof: Proof) -> tuple[bool | None, str]:
    """Whether a goal is met, None where the clips cannot tell; and that in words."""
    seen = _seen(goal, proof.speedup, proof.value)
    if goal.kind == "speedup":
        met: bool | None = proof.speedup >= (1 - TOLERANCE) * goal.value
    else:
        met = _quality(goal, proof)
    words = {True: "met", False: "NOT met", None: "cannot tell"}[met]
    return met, f"{goal}: {words}: {seen}{_interval(goal, proof)}, on {_clips(proof)}"


def _quality(goal: Goal, proof: Proof) -> bool | None:
    if proof.spread is None or proof.spread.low is None or proof.spread.high is None:
        return None
    low, high = proof.spread.low, proof.spread.high
    worst, best = (low, high) if goal.higher_is_better else (high, low)
    if goal.loss(worst) <= goal.loss(goal.value):
        return True
    return False if goal.loss(best) > goal.loss(goal.value) else None


def _merit(goal: Goal, proof: Proof) -> tuple[bool, float]:
    """The larger, the better a plan does what is asked: as fast as asked and then the best; as good as asked and then the
    fastest; where that is missed, the closest."""
    if goal.is_speed:
        fast = proof.speedup >= (1 - TOLERANCE) * goal.value
        return fast, -goal.loss(proof.value) if fast else proof.speedup
    loss = goal.loss(_bound(proof, goal))
    good = loss <= goal.loss(goal.value)
    return good, proof.speedup if good else -loss


def _bound(proof: Proof, goal: Goal) -> float:
    """The worse end of the interval; the mean, where there is none."""
    if proof.spread is None or proof.spread.low is None or proof.spread.high is None:
        return proof.value
    return proof.spread.low if goal.higher_is_better else proof.spread.high


def _interval(goal: Goal, proof: Proof) -> str:
    if proof.spread is None or proof.spread.low is None:
        return " (too few clips for an interval)"
    return f" (95 % interval {proof.spread.low:.4g} to {proof.spread.high:.4g})"


def _seen(goal: Goal, speedup: float, value: float) -> str:
    unit = " dB" if goal.metric == "psnr" else ""
    return f"{speedup:.2f}x, {goal.metric.upper()} {value:.4g}{unit}"


def _clips(proof: Proof) -> str:
    return f"{proof.clips} clip{'s' * (proof.clips > 1)}"


def _forwards(assignment: Assignment) -> Forwards | None:
    return assignment.steps.forwards if assignment.steps else None


def _name(assignment: Assignment) -> str:
    steps = f"{len(assignment.steps.computed)} steps" if assignment.steps else "all steps"
    return f"{steps}, density {assignment.density:.2f}"
