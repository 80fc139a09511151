"""`kvlink bench`: time to first token of every strategy, side by side in one process."""

from kvlink_rag.bench.run import BenchResult, run_bench
from kvlink_rag.bench.series import machine
from kvlink_rag.bench.show import table, write

__all__ = ["BenchResult", "machine", "run_bench", "table", "write"]
