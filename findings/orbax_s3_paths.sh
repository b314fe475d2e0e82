#!/usr/bin/env bash
# Orbax takes a path in S3 for a place to save to, makes its folders there, and fails in the background: the path has
# lost a slash by then (`s3:/bucket/...`) and is said not to be absolute. `save` itself has returned; the error comes with
# `wait_until_finished`, and nothing of the state is kept. Write checkpoints elsewhere, or arrays by a library of their
# own, where the store is S3.
# Seen with orbax-checkpoint 0.12.8, jax 0.10.2, s3fs 2026.9.0, against moto 5.2.5, a server of S3's protocol on this
# machine: `ValueError: Checkpoint path should be absolute. Got s3:/bucket/run/1.orbax-checkpoint-tmp`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 s3fs==2026.9.0 \
  aiobotocore==3.10.0 boto3==1.43.117 'moto[s3]==5.2.5' flask flask-cors python-dateutil==2.9.0.post0
export AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_DEFAULT_REGION=us-east-1 JAX_PLATFORMS=cpu
"$folder/venv/bin/python" - 2> "$folder/log" <<'PY' || { tail -5 "$folder/log"; exit 1; }
import importlib.metadata
import os

import boto3
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
host, port = server.get_host_and_port()
os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
store = boto3.client("s3")
store.create_bucket(Bucket="bucket")

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

for package in ("orbax-checkpoint", "jax", "s3fs", "moto"):
    print(package, importlib.metadata.version(package))
checkpointer = ocp.StandardCheckpointer()
error = None
try:
    checkpointer.save(epath.Path("s3://bucket/run/1"), {"a": np.arange(3.0)})
    print("save returned")
    checkpointer.wait_until_finished()
except ValueError as raised:
    error = str(raised)
print("error:", error)
made = [each["Key"] for each in store.list_objects_v2(Bucket="bucket").get("Contents", [])]
print("objects there:", made)
assert error is not None and "should be absolute" in error and "s3:/bucket" in error, "this has changed"
print("seen", flush=True)
os._exit(0)
PY
