"""Runs commands in processes that are forked from one which has imported everything: a kill costs no start-up.

Reads one JSON object per line: the commands to run at once, their directory, a file for what they say, and after how
many seconds the first of them is killed (null: it is not). Answers with exit codes (-9: killed) and seconds.
"""

import importlib
import json
import os
import pkgutil
import signal
import sys
import time

import mentalglm_jax
from mentalglm_jax.cli.main import main

for found in pkgutil.walk_packages(mentalglm_jax.__path__, "mentalglm_jax."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)


def start(command: list[str], directory: str, said: str) -> int:
    if pid := os.fork():
        return pid
    code: object = 1
    try:
        os.chdir(directory)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main(command)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stderr.flush()
        os._exit(int(str(code)))


for line in sys.stdin:
    asked = json.loads(line)
    began = time.monotonic()
    pids = [start(command, asked["directory"], asked["said"]) for command in asked["commands"]]
    if asked["kill"] is not None:
        time.sleep(asked["kill"])
        os.kill(pids[0], signal.SIGKILL)  # a child that has ended is there until it is waited for
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    sys.stdout.write(json.dumps({"codes": codes, "seconds": time.monotonic() - began}) + "\n")
    sys.stdout.flush()
