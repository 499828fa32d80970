"""What a rank did since each fragment was last synchronised, and what that weighs."""


class Tally:
    """steps, tokens: for each fragment. unit: tokens of a step that weigh 1, the same on all ranks; 0: not agreed on.
    square: of the L2 norm of this round's progress, as far as it was told."""

    def __init__(self, fragments: int) -> None:
        self.steps, self.tokens = [0] * fragments, [0] * fragments
        self.unit, self.square = 0, 0.0

    def add(self, steps: int, tokens: int) -> None:
        self.steps = [taken + steps for taken in self.steps]
        self.tokens = [counted + tokens for counted in self.tokens]

    def weight(self, fragment: int) -> float:
        """Of this rank's progress: its tokens per step."""
        steps = self.steps[fragment]
        return self.tokens[fragment] / (self.unit * steps) if steps else 1.0

    def clear(self, fragment: int) -> None:
        self.steps[fragment] = self.tokens[fragment] = 0
