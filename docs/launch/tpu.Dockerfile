# jaxsft on TPU hosts. Not built where it was written: see docs/launch.md.
#   docker build -f docs/launch/tpu.Dockerfile -t jaxsft-tpu .
FROM python:3.11-slim
WORKDIR /jaxsft
COPY pyproject.toml README.md LICENSE MANIFEST.in constraints.txt run.py ./
COPY jaxsft jaxsft
COPY configs configs
# jax[tpu] brings the libtpu that fits the jax of the constraints.
RUN pip install --no-cache-dir -e '.[tpu,buckets]' -c constraints.txt
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "run.py"]
