"""The playground's page: which elements there are and what each one sets off. What they do is in ``page``."""

from __future__ import annotations

from typing import Any

import gradio as gr

from e2p.serving.http.inside import PAGE, Door
from e2p.serving.http.page import COLUMNS, Page

TITLE = "e2p playground"
_HEAD = """<h1>One question, different people</h1>
<p>The same frozen model answers in every column. All that differs is one soft token, made of the user's vector: the
prompt, the seed and the temperature are the same.</p>"""
_STYLE = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
.e2p-head h1 { font-size: 1.55rem; font-weight: 650; margin: .2rem 0 .1rem; }
.e2p-head p { margin: 0; opacity: .75; max-width: 62rem; }
.e2p-column { border-top: 4px solid var(--e2p-tone); border-radius: 10px; padding: .7rem .9rem .8rem;
  background: var(--block-background-fill); box-shadow: 0 1px 3px rgba(0, 0, 0, .12); gap: .5rem; }
.e2p-asking { align-items: flex-end; }
.e2p-asking button { height: 44px; margin-bottom: 4px; }
.e2p-column label > span, .e2p-column .label-wrap { color: var(--e2p-tone); font-weight: 650; }
.e2p-about { min-height: 5.4rem; }
.e2p-answer { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 1.06rem; line-height: 1.5;
  min-height: 5.2rem; }
.e2p-foot, .e2p-line { font-size: .82rem; opacity: .78; margin: .2rem 0 0; overflow-wrap: anywhere; }
.e2p-error { color: #c23a2b; font-weight: 600; margin: .3rem 0; overflow-wrap: anywhere; }
.e2p-map { width: 100%; max-width: 640px; display: block; margin: 0 auto; }
.e2p-map .e2p-title { font-size: 12px; fill: currentColor; opacity: .8; }
.e2p-map .e2p-frame { fill: none; stroke: #8a8f98; stroke-opacity: .35; }
.e2p-map circle { fill-opacity: .38; }
.e2p-map .e2p-mark circle { fill-opacity: 1; stroke: #fff; stroke-width: 1.6; }
.e2p-map .e2p-mark text { fill: #fff; font-size: 10px; font-weight: 700; text-anchor: middle; pointer-events: none; }
""" + "".join(f".e2p-{label} {{ --e2p-tone: {tone}; }}\n" for label, tone in COLUMNS)
_FONTS = ("system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif")


def mount(page: Page) -> None:
    """Put the page under /playground of the page's application."""
    gr.mount_gradio_app(
        page.app,
        form(page),
        path=PAGE,
        theme=gr.themes.Base(primary_hue="emerald", neutral_hue="slate", font=_FONTS, font_mono=("monospace",)),
        css=_STYLE,
        footer_links=[],
        run_history=False,  # it would keep keys and prompts in the browser
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
        max_file_size=1,
        app_kwargs={"redirect_slashes": False},
    )
    route = page.app.router.routes[-1]
    route.app = Door(route.app, page.service.config.limits)


def form(page: Page) -> Any:
    """The page. Nothing of models or users is in it: it is filled when it is opened, by a key where there are keys."""
    limits, locked = page.service.config.limits, bool(page.service.keys)
    # A function is called by its place in the page alone; Gradio's own API has no names for them.
    own: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.HTML(_HEAD, elem_classes="e2p-head")
        with gr.Row(visible=locked, equal_height=True) as gate:
            key = gr.Textbox(
                label="Key with the scopes generate and users:read; it is kept in this page alone",
                type="password",
                elem_id="e2p-key",
                scale=5,
            )
            enter = gr.Button("Open", variant="primary", elem_id="e2p-open", scale=1, min_width=90)
        note = gr.HTML(elem_id="e2p-note", visible=False)
        with gr.Column(visible=False) as body:
            with gr.Row(elem_classes="e2p-asking"):
                prompt = gr.Textbox(
                    label="Ask all of them", lines=1, max_lines=6, scale=6, elem_id="e2p-prompt", submit_btn=False
                )
                ask = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="e2p-ask")
                stop = gr.Button("Stop", scale=0, min_width=70, elem_id="e2p-stop")
            examples = gr.Dataset(components=[prompt], samples=[], label="or", visible=False, show_label=False)
            users, profiles, answers = [], [], []
            with gr.Row(equal_height=True):
                for label, _ in COLUMNS:
                    classes = ["e2p-column", f"e2p-{label}"]
                    with gr.Column(elem_classes=classes, min_width=250, elem_id=f"e2p-column-{label}") as column:
                        users.append(
                            gr.Dropdown(
                                [], value=None, allow_custom_value=True, elem_id=f"e2p-user-{label}",
                                label=f"User {label} · pick one, or type any id",
                            )
                        )  # fmt: skip
                        profiles.append(gr.HTML(elem_id=f"e2p-about-{label}", elem_classes="e2p-about"))
                        answers.append(gr.HTML(elem_id=f"e2p-answer-{label}"))
            with gr.Row():
                with gr.Column(scale=4, min_width=300):
                    strength = gr.Slider(
                        0, 2, 1, step=0.05, label="How much of the person", elem_id="e2p-strength",
                        info="0: the null user, the same for all · 1: as trained · 2: exaggerated",
                    )  # fmt: skip
                    with gr.Accordion("Settings", open=False):
                        adapter = gr.Dropdown(
                            [], value=None, allow_custom_value=True, label="Adapter", elem_id="e2p-adapter"
                        )
                        heat = gr.Slider(0, 2, 0.7, step=0.1, label="Temperature", elem_id="e2p-temperature")
                        longest = gr.Slider(
                            1, limits.max_tokens, min(64, limits.max_tokens), step=1, label="Longest answer, tokens"
                        )
                        seed = gr.Number(0, precision=0, label="Seed, the same for all")
                        third = gr.Checkbox(True, label="A third column", elem_id="e2p-third")
                with gr.Column(scale=6, min_width=300):
                    places = gr.HTML(elem_id="e2p-places")

        filled = [note, gate, body, adapter, *users, prompt, examples, strength]
        looks: dict[str, Any] = {"inputs": [key, adapter, third, *users], "outputs": [places, *profiles], **own}
        opened = gr.on([enter.click, key.submit], page.open, [key], filled, **own)
        opened.then(page.look, **looks)
        if not locked:
            blocks.load(page.open, [key], filled, **own).then(page.look, **looks)
        adapter.input(page.turn, [key, adapter], [strength], **own).then(page.look, **looks)
        gr.on([*(user.input for user in users), third.input], page.look, **looks, trigger_mode="always_last")
        third.input(lambda shown: gr.update(visible=shown), [third], [column], **own)
        examples.click(lambda row: row[0], [examples], [prompt], **own)
        common = [prompt, strength, heat, longest, seed]
        # One function for all columns: what one click sets off, Gradio's page does one after the other.
        running = [
            gr.on(
                [ask.click, prompt.submit, strength.release],
                page.answers,
                [key, adapter, third, *users, *common],
                answers,
                trigger_mode="always_last",
                **own,
            )
        ]
        for user, answer in zip(users, answers, strict=True):
            one = user.input(page.answer, [key, adapter, user, *common], [answer], trigger_mode="always_last", **own)
            running.append(one)
        stop.click(None, cancels=running, api_visibility="private")
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks
