"""Agents in processes of their own, on one machine or several, by Ray (extra `[ray]`).

`RayExecutor` runs the tasks that the dispatcher makes (`recmas.scheduling`), as the local executor does: a `Replica` is
one process of an agent, `AgentProcess` what runs in it. Messages pass from process to process as sealed bytes
(`recmas.distributed.sealed`). `RaySystem` answers rows with all of that.
"""
