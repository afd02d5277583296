"""Run the command lines given as JSON on the standard input, one after the other, each in a fork of this process.

What they share, the imports, is done once. Ends with the first command that fails.
"""

import importlib
import json
import os
import pkgutil
import runpy
import sys
import traceback

import maskdm_jax

root, lines = json.load(sys.stdin)
sys.path[:0] = [root, f"{root}/experiments"]
for module in pkgutil.walk_packages(maskdm_jax.__path__, "maskdm_jax."):
    if "torch_folder" not in module.name:
        importlib.import_module(module.name)
for line in lines:
    print("$", " ".join(line), flush=True)
    child = os.fork()
    if not child:
        sys.argv = [f"{root}/{line[0]}", *line[1:]]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else ended.code is not None
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"{' '.join(line)} ended with status {status}")
