"""torchrun's own agent, with workers that are forked instead of started, so that none imports the libraries again.

`main([PROCESSES, RESTARTS, MODULE, ARGUMENT...])` is `torchrun --standalone --nproc-per-node PROCESSES --max-restarts
RESTARTS -m MODULE ARGUMENT...`, for `Command` of training_world.
"""

from __future__ import annotations

import importlib
import sys


def main(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    processes, restarts, module, *rest = arguments
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        max_restarts=int(restarts),
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, work)(module, rest)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def work(module: str, arguments: list[str]) -> None:
    code = importlib.import_module(module).main(arguments)
    if code:
        sys.exit(code)
