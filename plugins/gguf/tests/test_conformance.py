"""The promises of the card, kept."""

from polyquant.testing import BackendConformance, Floor


class TestGguf(BackendConformance):
    backend = "gguf"
    floors = {
        "Q4_0": Floor(kl=0.32, top1=0.67),
        "Q4_1": Floor(kl=0.001, top1=0.95),  # the real model was Q4_1 before: nothing is lost a second time
        "Q5_0": Floor(kl=0.08, top1=0.8),
        "Q5_1": Floor(kl=0.15, top1=0.79),
        "Q8_0": Floor(kl=0.002, top1=0.94),
    }
