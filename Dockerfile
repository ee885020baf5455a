# One image for the site and the workers; the environment is built by the script that `make run` uses.
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 studio && mkdir /app /data && chown studio: /app /data
USER studio
WORKDIR /app

COPY --chown=studio bootstrap.py package.json package-lock.json .npmrc ./
COPY --chown=studio requirements requirements
RUN python bootstrap.py run && rm -rf node_modules /home/studio/.cache
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1

COPY --chown=studio manage.py ./
COPY --chown=studio fewshot_engine fewshot_engine
COPY --chown=studio worker worker
COPY --chown=studio templates templates
COPY --chown=studio static static
COPY --chown=studio webapp webapp
VOLUME /data
EXPOSE 8000
