"""A stub until the evaluation lands."""

import dataclasses


@dataclasses.dataclass
class Tasks:
    @classmethod
    def read(cls, sts, retrieval):
        return cls()

    def scores(self, e):
        return {}
