"""The hub: a web server over stores, and the dashboard that it serves.

A door like the command line: it reads stores and puts commands into them by `onthefly.client`, and keeps nothing of its
own that matters, so it can be killed and started again at any time. It may import the client, the store, `control.commands`
and what reads checkpoints' headers and samples; never torch, never a session. What needs torch (compare, verify, fsck) it has
done by a child process. Everything that it is sent or reads (names, logs, paths) is taken for hostile.

`auth` lets in, `guard` keeps out, `api` answers, `live` is the WebSocket, `charts` makes few points of many, `columns` is the
binary form, `serve` is the process. It needs the packages of the extra `ui`; only `cli.ui` imports it.
"""
