"""Answers of a cluster of two machines, imitated on this one, the second of which is lost while they are made.

Arguments: folder of the system, whose learner needs the resource "second". Prints what was answered before and during
the loss, and how many processes were started again, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}

import ray
from ray.cluster_utils import Cluster

from recmas.distributed.order import Loading
from recmas.distributed.system import RaySystem
from tests.runtime.distributed.test_nodes import QUESTIONS


def main(folder: str) -> None:
    # Every message lies in the store of the machine where it was made, and is lost with it.
    head = {"num_cpus": 1, "_system_config": {"max_direct_call_object_size": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second: dict[str, Any] = {"num_cpus": 1, "resources": {"second": 1}}
    node = cluster.add_node(**second)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with RaySystem(Loading(folder=folder)) as system:
            before = [answer.text for answer in system.answer(QUESTIONS, batch_size=4)]
            lost = threading.Event()

            def lose(count: int) -> None:
                if not lost.is_set():
                    lost.set()
                    cluster.remove_node(node)
                    cluster.add_node(**second)

            during = [answer.text for answer in system.answer(QUESTIONS, batch_size=4, progress=lose)]
            restarts = system.executor.restarts
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"before": before, "during": during, "restarts": restarts}))


if __name__ == "__main__":
    main(sys.argv[1])
