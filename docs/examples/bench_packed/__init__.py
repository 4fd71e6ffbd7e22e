"""The parts of bench_packed.py. Each lists its cells, measures one of them in a process of its own, names its figures:

`cells(asked)`, `measure(source, sizes, **job)`, and FIGURES, COMPARED (those with a ratio), RATIO (what it is to).
"""
