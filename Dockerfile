# A server for bundles: runtime only, no torch, not root.
#
#   docker build -t repmlp-serve .
#   docker run --read-only -p 8000:8000 -p 8001:8001 -v "$PWD/artifacts:/models:ro" repmlp-serve

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md export.py ./
COPY repmlp_deploy repmlp_deploy
COPY models models
RUN python -m venv /opt/repmlp \
 && /opt/repmlp/bin/pip install --no-cache-dir -c constraints.txt ".[serve,cpu,openvino]"

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home repmlp
COPY --from=build /opt/repmlp /opt/repmlp
USER 10001
ENV PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000 8001
VOLUME /models
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
  CMD ["/opt/repmlp/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["/opt/repmlp/bin/repmlp-serve", "--host", "0.0.0.0", "--log-format", "json"]
CMD ["--watch", "/models"]
