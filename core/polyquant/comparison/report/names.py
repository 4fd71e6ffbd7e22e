"""Where the names of points stand in a picture: none over another, over a mark, or outside. Imports nothing heavy.

The page places its own in templates/labels.js, in the same way: it knows its width only when it is open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

MARK, GAP, STEP = 6.0, 3.0, 6.0  # half a mark's box, what is kept between two boxes, between places tried
TRIED = 120  # free places that are looked at for a name, the nearest
NEAR = 9.0  # from a mark's middle to a name that needs no line to it
PREFERRED = 20.0  # a name with a line costs as much as this way
CROSSED_NAME, CROSSED_MARK, CROSSED_LEADER = 400.0, 90.0, 60.0  # ways that are better gone than crossing one of these
Place = tuple[float, float]


class Box(NamedTuple):
    """A rectangle; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, middle: Place, width: float, height: float) -> Box:
        """That with this middle."""
        (x, y), half, up = middle, width / 2, height / 2
        return cls(x - half, y - up, x + half, y + up)

    @property
    def middle(self) -> Place:
        """Its middle."""
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def grown(self, by: float) -> Box:
        """Larger on every side."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def apart(self, other: Box) -> bool:
        """Whether the two share no area."""
        beside = self.right <= other.left or self.left >= other.right
        return beside or self.top <= other.bottom or self.bottom >= other.top

    def holds(self, other: Box) -> bool:
        """Whether the other is inside."""
        low = self.left <= other.left and self.bottom <= other.bottom
        return low and self.right >= other.right and self.top >= other.top

    def way(self, place: Place) -> float:
        """From a place to the nearest of its own."""
        x, y = place
        return math.hypot(max(self.left - x, 0, x - self.right), max(self.bottom - y, 0, y - self.top))

    def crossed(self, one: Place, other: Place) -> bool:
        """Whether the straight way between two places leads through it."""
        start, end = 0.0, 1.0
        sides = ((one[0], other[0], self.left, self.right), (one[1], other[1], self.bottom, self.top))
        for a, b, low, high in sides:
            if a == b:
                if not low < a < high:
                    return False
                continue
            enters, leaves = sorted(((low - a) / (b - a), (high - a) / (b - a)))
            start, end = max(start, enters), min(end, leaves)
        return start < end


class Named(NamedTuple):
    """A name's place."""

    box: Box
    leader: bool  # whether a line leads from the point to it


def placed(points: Sequence[Place], sizes: Sequence[tuple[float, float]], area: Box) -> list[Named] | None:
    """A place for the name of each point; None where the area has no room for all of them.

    points: all marks; sizes: (width, height) of their names; all in one unit, about a printer's point.
    """
    marks = [Box.around(point, 2 * MARK, 2 * MARK) for point in points]
    names: list[Box] = []
    leaders: list[tuple[Place, Place]] = []
    done: dict[int, Named] = {}
    for index in sorted(range(len(points)), key=lambda each: points[each][1]):
        point = points[index]
        best, least = None, math.inf
        for box, near in islice(_free(point, *sizes[index], area, names + marks), TRIED):
            total = near + box.way(point)
            if total >= least:
                break
            room = box.grown(GAP / 2)
            total += CROSSED_NAME * sum(room.crossed(*leader) for leader in leaders)
            if near >= PREFERRED:
                line = (box.middle, point)
                total += CROSSED_NAME * sum(name.crossed(*line) for name in names)
                total += CROSSED_MARK * sum(mark.crossed(*line) for mark in marks if mark.middle != point)
                total += CROSSED_LEADER * sum(_cross(line, leader) for leader in leaders)
            if total < least:
                best, least = Named(box, near >= PREFERRED), total
        if best is None:
            return None
        names.append(best.box)
        if best.leader:
            leaders.append((best.box.middle, point))
        done[index] = best
    return [done[index] for index in range(len(points))]


def _free(point: Place, width: float, height: float, area: Box, taken: Sequence[Box]) -> Iterator[tuple[Box, float]]:
    """Boxes where a name may stand, near its point or anywhere, each with its cost; by that and the way to them."""
    import numpy as np

    right, up = NEAR + width / 2, NEAR + height / 2
    near = [(right, 0.0), (right, height / 2), (right, -height / 2), (-right, 0.0), (-right, height / 2)]
    near += [(-right, -height / 2), (0.0, up), (0.0, -up)]
    left, bottom = (
        each.ravel()
        for each in np.meshgrid(
            np.arange(area.left, area.right - width, 2 * STEP), np.arange(area.bottom, area.top - height, STEP)
        )
    )
    left = np.concatenate([[point[0] + x - width / 2 for x, _ in near], left])
    bottom = np.concatenate([[point[1] + y - height / 2 for _, y in near], bottom])
    cost = np.full(len(left), PREFERRED)
    cost[: len(near)] = range(len(near))
    free = (left >= area.left) & (bottom >= area.bottom)
    free &= (left + width <= area.right) & (bottom + height <= area.top)
    for other in taken:
        low, high = other.grown(GAP / 2)[:2], other.grown(GAP / 2)[2:]
        beside = (left + width <= low[0]) | (left >= high[0])
        free &= beside | (bottom + height <= low[1]) | (bottom >= high[1])
    left, bottom, cost = left[free], bottom[free], cost[free]
    across = np.maximum(np.maximum(left - point[0], 0), point[0] - left - width)
    along = np.maximum(np.maximum(bottom - point[1], 0), point[1] - bottom - height)
    for index in np.argsort(cost + np.hypot(across, along), kind="stable"):
        x, y = float(left[index]), float(bottom[index])
        yield Box(x, y, x + width, y + height), float(cost[index])


def _cross(line: tuple[Place, Place], other: tuple[Place, Place]) -> bool:
    def side(a: Place, b: Place, c: Place) -> bool:
        return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])

    apart = side(*line, other[0]) == side(*line, other[1]) or side(*other, line[0]) == side(*other, line[1])
    return not apart
