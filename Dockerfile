# Etude on a CPU. From the clone:
#   docker build -t etude .
#   docker run --rm -it -v "$PWD:/work" etude train config.yml --preset quickstart
FROM python:3.12-slim
WORKDIR /etude
COPY requirements.lock ./
# torch is not in the lock; this build has no CUDA and takes gigabytes less.
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock \
    && pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
# Models come from the Hub into HF_HOME, converted GGUF files into ETUDE_CACHE: mount /cache to keep them.
ENV HF_HOME=/cache/huggingface ETUDE_CACHE=/cache/etude
# The working folder holds config.yml, data and runs/.
WORKDIR /work
ENTRYPOINT ["etude"]
CMD ["--help"]
