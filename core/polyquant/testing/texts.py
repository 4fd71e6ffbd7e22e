"""Short English texts, written for this suite: to calibrate with, and to compare with the dense model on."""

from __future__ import annotations

CALIBRATION_TEXT = """\
The water of the lake was still, and the mountains on the other shore stood upside down in it. A boat lay on the
stones; somebody had turned it over for the winter and laid a rope across the keel.

To bake bread one needs flour, water, salt and time. Mix them in the evening, let the dough rest through the night,
fold it in the morning, and put it into a hot oven when it has doubled.

A prime number has exactly two divisors, one and itself. There is no largest prime: multiply all that are known, add
one, and the result is divided by none of them.

The train to the coast leaves at seven from the second platform. Passengers with bicycles use the last carriage; the
journey takes three hours and ten minutes.

When the king asked who had planted the garden, the old woman said that she had planted nothing. She had only
watered what came up, and pulled out what choked it.

Light travels about three hundred thousand kilometres in one second. From the sun to the earth it needs a little
more than eight minutes, so the sun that we see is the sun of eight minutes ago.

In the first year the company sold forty machines, in the second two hundred, and in the third it could not build
them fast enough. By the fifth year a competitor sold the same machine for half the price.

Rain fell all week on the valley. The river rose over the lower meadows, and the farmers drove the cattle up to the
old road, where the ground is stony and dry.
"""

EVALUATION_TEXT = """\
The library opens at nine in the morning and closes at six in the evening, except on Sundays, when it does not open
at all. Books may be borrowed for four weeks. Anyone who returns a book late pays a small fine for each day, and
anyone who loses one pays for a new copy. The reading room on the first floor is quiet; visitors who want to talk
are asked to use the room beside the entrance. In the year after the great storm the roof had to be repaired, and
the older newspapers were moved to the cellar of the town hall, where they can still be read if one asks for them
two days in advance. The librarian says that most people come for the newspapers of the week in which they were
born. They turn the pages slowly, and are surprised that the weather was so bad and that bread was so cheap.
"""

CALIBRATION = tuple(" ".join(paragraph.split()) for paragraph in CALIBRATION_TEXT.split("\n\n"))
"""Paragraphs for backends that calibrate."""

EVALUATION = " ".join(EVALUATION_TEXT.split())
"""The text whose tokens the floors of the suite are measured on."""
