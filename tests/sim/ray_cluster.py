"""A Ray cluster of so many nodes with one worker each, on loopback: `python ray_cluster.py NODES`.

Prints the address, then takes commands from stdin: a line `drop` kills the node that came last without a word. It ends
when stdin does.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from contextlib import ExitStack
from typing import Any

# No usage reports, loopback for every node (see sim/experiment/parallel.py), patience on a busy machine.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_raylet_start_wait_time_s": "300",
}


# A node waits for its agents for a fixed 15 s to learn their ports, too little on a busy machine: it is told them.
AGENT_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def node() -> dict[str, Any]:
    """The settings of one node."""
    with ExitStack() as free:
        sockets = [free.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in AGENT_PORTS]
        ports = {name: each.getsockname()[1] for name, each in zip(AGENT_PORTS, sockets, strict=True)}
    return ports | {
        "num_cpus": 1,
        "node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "include_log_monitor": False,
        "object_store_memory": 80 * 2**20,
    }


def main() -> None:
    """Runs the cluster."""
    from ray.cluster_utils import Cluster

    # Short: sockets live in it, and their paths have a limit. Ray writes the cluster's address into RAY_TMPDIR/ray, and
    # does not create that folder, whatever `temp_dir` says.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        temp_dir = os.path.join(folder, "ray")
        os.mkdir(temp_dir)
        cluster = Cluster(initialize_head=True, head_node_args={**node(), "temp_dir": temp_dir, "no_monitor": True})
        nodes = [cluster.add_node(**node()) for _ in range(int(sys.argv[1]) - 1)]
        print(cluster.address, flush=True)
        for line in sys.stdin:
            assert line == "drop\n", line
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("dropped", flush=True)
        cluster.shutdown()


if __name__ == "__main__":
    main()
