"""Answers of a cluster of two machines, imitated on this one, the second of which is lost, and at last for good.

Arguments: folders of systems, whose last agent needs the resource "second", and all others "first". Prints as JSON, of
each system, what was answered; and of the last one what was answered while the machine was lost and another came, how
many processes were started again, and what is said when no other one comes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}

import ray
from ray.cluster_utils import Cluster

from recmas.answering.answers import RowsFailedError
from recmas.distributed import replica
from recmas.distributed.order import Loading
from recmas.distributed.system import RaySystem
from tests.runtime.distributed.test_nodes import QUESTIONS


def main(folders: list[str]) -> None:
    # Every message lies in the store of the machine where it was made, and is lost with it.
    head = {"num_cpus": 1, "resources": {"first": 1}, "_system_config": {"max_direct_call_object_size": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second: dict[str, Any] = {"num_cpus": 1, "resources": {"second": 1}}
    nodes = [cluster.add_node(**second)]
    ray.init(address=cluster.address, log_to_driver=False)
    found: dict[str, Any] = {"before": []}
    try:
        for folder in folders:
            with RaySystem(Loading(folder=folder)) as system:
                found["before"].append([answer.text for answer in system.answer(QUESTIONS, batch_size=4)])
                if folder == folders[-1]:
                    lost = threading.Event()

                    def lose(count: int, lost: threading.Event = lost) -> None:
                        if not lost.is_set():
                            lost.set()
                            cluster.remove_node(nodes.pop())
                            nodes.append(cluster.add_node(**second))

                    found["during"] = [a.text for a in system.answer(QUESTIONS, batch_size=4, progress=lose)]
                    found["restarts"] = system.executor.restarts
                    replica.RETURN = 1.0
                    cluster.remove_node(nodes.pop())
                    try:
                        system.answer(QUESTIONS[:2])
                    except RowsFailedError as error:
                        found["after"] = str(error)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
