# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a recipe takes on a machine one does not have: memory per GPU by part, time of rollout and update, the bottleneck.

Read in this order: shape.py (the model; published.py has some), cluster.py (the machine), episodes.py (how many tokens
there are), plan.py (what a recipe's YAML asks for), states.py (what lies in memory all along), dry_run.py (what passes
need besides, found without any memory), memory.py, timing.py, report.py.
"""
