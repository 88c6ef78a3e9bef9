# Jupyter on top of the image, for docker/walkthrough.ipynb: `make notebook` builds and runs it.
ARG IMAGE=trn-tune
# hadolint ignore=DL3006
FROM ${IMAGE}

USER 0
# Jupyter's packages may not have moved the stages': they are imported once more.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore python3 -m pip install --no-cache-dir --disable-pip-version-check \
      --requirement docker/notebook-requirements.txt; \
    python3 -B -c "import torch, transformers, tokenizers, datasets, click"
USER 1000:1000

# All addresses of the container, of which docker/run publishes 127.0.0.1:8080 of the host; the token that Jupyter prints
# stays on. A caller who is root is root in here.
EXPOSE 8080
ENTRYPOINT ["jupyter", "lab", "--ip=0.0.0.0", "--port=8080", "--ServerApp.port_retries=0", "--no-browser", "--allow-root", "--ServerApp.root_dir=/trn-tune"]
CMD ["docker/walkthrough.ipynb"]
