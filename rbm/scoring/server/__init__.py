"""`rbm serve`: one model for many clients, over HTTP and websockets.

1. The *front* (`run`, `app`, `guard`, `stream`, `engine`) is one asyncio process. It speaks to clients, checks what
   they send, and never imports torch nor decodes a picture.
2. *Workers* (`worker`), one a device, hold the model and the live sessions. What waits for a worker is answered in as
   few forwards as possible, whoever sent it.
3. The *decoder* (`decoder`) turns uploaded bytes into frames. It is killed and started again when a file takes too long
   or brings it down.

The front starts the other processes and speaks with each over a pair of sockets (`pipes`, `children`); one that dies is
started again.
"""
