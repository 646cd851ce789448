"""Many rows on their way through a system at once: rows come and go, and agents work side by side.

A `Row` takes the walk by itself. The `Dispatcher` puts rows that wait for the same work into one `Task`, an `Executor`
runs tasks on agents: `LocalExecutor` does so in threads of this process. A `Worker` is what runs a task.
"""
