"""Which computed step may follow which: the states between two runs of predicted steps."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_accel.forwards import Predictor

State = tuple[int, ...]  # the last computed steps from which a predictor goes on, oldest first; of one expert
LONGEST = 12  # predicted steps in a row
MOST_STATES = 3000


@dataclass(frozen=True)
class StateGraph:
    """The states of a schedule.

    Args:
        steps: of the schedule.
        fresh: steps that compute with nothing known before: the first, and the first of each expert.
        looks_back: how many computed steps the predictor uses.
        longest: most steps in a row that are predicted.
    """

    steps: int
    fresh: tuple[int, ...]
    looks_back: int
    longest: int = LONGEST

    @property
    def start(self) -> State:
        return (0,)

    def ends(self, state: State) -> range:
        """The steps that may be computed next."""
        last = state[-1]
        fence = min((step for step in (*self.fresh, self.steps - 1) if step > last), default=last)
        return range(last + 1, min(fence, last + self.longest + 1) + 1)

    def after(self, state: State, end: int) -> State:
        """The state once `end` was computed."""
        return (end,) if end in self.fresh else (*state, end)[-self.looks_back :]

    def states(self) -> tuple[State, ...]:
        """All of them, by their last step."""
        found = {self.start: None}
        rows: list[list[State]] = [[] for _ in range(self.steps)]
        rows[0].append(self.start)
        for row in rows:  # filled on the way: whatever follows ends later
            for state in row:
                for end in self.ends(state):
                    if (then := self.after(state, end)) not in found:
                        found[then] = None
                        rows[end].append(then)
        return tuple(state for row in rows for state in row)


def state_graph(steps: int, fresh: tuple[int, ...], predictor: Predictor) -> StateGraph:
    """The states of a predictor.

    Raises:
        ValueError: there are too many, because it looks back far in a long schedule.
    """
    graph = StateGraph(steps, fresh, predictor.looks_back)
    count = steps * LONGEST ** (graph.looks_back - 1)  # at most
    if graph.looks_back > 2 and count > MOST_STATES and (count := len(graph.states())) > MOST_STATES:
        raise ValueError(
            f"{predictor.label}: it looks back at {graph.looks_back} computed steps, of which a schedule of {steps} steps has "
            f"{count:,} combinations; expected at most {MOST_STATES:,}. Take one that looks back at 1 or 2, or fewer steps"
        )
    return graph
