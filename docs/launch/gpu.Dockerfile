# jaxsft on hosts with NVIDIA GPUs. Not built where it was written: see docs/launch.md.
#   docker build -f docs/launch/gpu.Dockerfile -t jaxsft-gpu .
FROM python:3.11-slim
WORKDIR /jaxsft
COPY pyproject.toml README.md LICENSE MANIFEST.in constraints.txt run.py ./
COPY jaxsft jaxsft
COPY configs configs
# jax[cuda12] brings CUDA, cuDNN and NCCL as packages; of the host only the driver is needed.
RUN pip install --no-cache-dir -e '.[cuda,buckets]' -c constraints.txt
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "run.py"]
