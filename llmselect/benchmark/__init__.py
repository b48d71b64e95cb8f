"""The benchmark of selectors: a grid of fine-tunings that several processes share, its leaderboard, and the LDS.

Layout::

    <cells>/<model>/<target>/<method>/<budget>-seed-<s>.json    one file per cell: losses and costs, nothing else is needed
    <out>/<model>/<target>/                                     the run that the cells of a model and target set share
    <out>/claims/                                               who works on what
"""
