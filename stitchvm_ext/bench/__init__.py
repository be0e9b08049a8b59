"""The benchmark suite behind ``stitchvm bench``: one module per question, and what they share.

``harness`` times and records, ``scales`` builds the models at three sizes, ``profiling`` divides a step into phases.
"""
