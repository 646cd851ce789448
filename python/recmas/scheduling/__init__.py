"""Many rows on their way through a system at once: rows come and go, and agents work side by side.

A `Row` takes the walk by itself. The `Dispatcher` puts rows that wait for the same work into one `Task`, an `Executor`
runs tasks on agents: in threads of this process (`LocalExecutor`), or in actors on other machines
(`recmas.distributed`). A `Worker` is what runs a task, in either place.
"""
