"""What a network costs, how fast it runs on this machine, and a drawing of it.

Read `costs` first (`inspect`: parameters, multiply-adds, memory and time of each layer; `compare`:
two such reports side by side), then `benchmark` (a model timed in each way to run it), `timing`
(how calls are timed fairly) and `drawing` (the graph as SVG).
"""

from vggtorch.measuring.benchmark import Bench, bench
from vggtorch.measuring.costs import Comparison, Report, compare, inspect, operation_counter
from vggtorch.measuring.drawing import draw
from vggtorch.measuring.timing import in_turns

__all__ = [
    "Bench",
    "Comparison",
    "Report",
    "bench",
    "compare",
    "draw",
    "in_turns",
    "inspect",
    "operation_counter",
]
