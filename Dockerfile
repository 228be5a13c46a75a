# docker build -t rlhf .
# docker run --rm rlhf make test
# docker run --rm --gpus all -v "$PWD":/work -w /work rlhf rlhf sft --config sft.yaml
FROM python:3.12-slim

# git: run.yaml records the commit of the working directory. A compiler: torch.compile makes kernels with it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer/rlhf

# The wheel of torch on the package index has CUDA's libraries. For a small image without them, name an index of CPU
# wheels: --build-arg PIP_EXTRA_INDEX_URL=…
ARG PIP_EXTRA_INDEX_URL
ENV PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

COPY --chown=trainer . .
RUN make setup
ENV PATH=/home/trainer/rlhf/.venv/bin:$PATH
CMD ["rlhf", "--help"]
