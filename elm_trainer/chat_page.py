"""The page of `elm chat`: both answers side by side, attacks as buttons, the report's pictures. It asks nothing of other servers."""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .chat import DEFINITION, PLAIN, Answer, ChatConcept, ErasureChat, percent
from .evaluation.pair import SIDES
from .evaluation.report import read_report
from .evaluation.tables import MAIN_COLUMNS, main_rows, verdict_lines


HOST = "127.0.0.1"
PICTURES = ("report.png", "inside.png", "attacks.png")
_MOST_PICTURE_BYTES = 8 * 2**20
_PNG = b"\x89PNG\r\n\x1a\n"
# The browser, too, is told to fetch nothing from elsewhere.
_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_CSS = """
.elm-answer { line-height: 2.6; min-height: 8em; overflow-wrap: anywhere; }
.elm-token { display: inline-block; text-align: center; white-space: pre; border-radius: 3px; vertical-align: top; line-height: 1.2; }
.elm-token small { display: block; font-size: 9px; opacity: .65; }
.elm-state, .elm-note { opacity: .75; font-size: 13px; }
.elm-report table { font-size: 12px; border-collapse: collapse; } .elm-report td, .elm-report th { padding: 1px 8px; text-align: left; }
.elm-report img { max-width: 100%; background: white; }
"""


def answer_html(answer: Answer) -> str:
    """An answer, token by token, with the concept's probability beneath each, in percent."""
    tokens = []
    for token in answer.tokens:
        shade = 0.0 if token.concept is None else token.concept
        title = f"token {token.id}: probability {token.probability:.3f}"
        title += "" if token.concept is None else f"; of the concept in its place {token.concept:.4f}"
        text, line_break = token.text.replace("\n", "⏎"), "<br>" * token.text.count("\n")
        tokens.append(
            f'<span class="elm-token" style="background: rgba(220, 50, 47, {0.75 * shade:.2f})" title="{escape(title)}">'
            f"{escape(text) or '·'}<small>{percent(token.concept)}</small></span>{line_break}"
        )
    state = f"{answer.state}, {len(answer.tokens)} tokens; the concept at most {percent(answer.highest)} %"
    return f'<div class="elm-answer">{"".join(tokens)}</div><div class="elm-state">{state}</div>'


def report_html(folder: str | Path) -> str:
    """The pictures and the main metrics that lie in an adapter's folder, or in the one above, where `elm erase` puts them."""
    places = [Path(folder), Path(folder).resolve().parent]
    parts = []
    report = next((place / "report.json" for place in places if (place / "report.json").is_file()), None)
    if report is not None:
        try:
            read = read_report(report)
            lines = "".join(f"<li><b>{escape(state)}</b> {escape(why)}</li>" for state, why in verdict_lines(read))
            head, *rows = (
                "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
                for tag, row in [("th", MAIN_COLUMNS), *(("td", row) for row in main_rows(read))]
            )
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            parts.append(f"<ul>{lines}</ul><table><tr>{head}</tr>{body}</table>")
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            # Somebody else may have written it.
            parts.append(f"<p>{escape(str(report))} cannot be shown ({escape(repr(error))}): measure again.</p>")
    for name in PICTURES:
        path = next((place / name for place in places if (place / name).is_file()), None)
        if path is not None and path.stat().st_size <= _MOST_PICTURE_BYTES and (data := path.read_bytes())[:8] == _PNG:
            picture = base64.b64encode(data).decode()
            parts.append(f'<p><img alt="{name}" src="data:image/png;base64,{picture}"></p>')
    if not parts:
        parts.append(
            "<p>No report.json or report.png beside this adapter: <code>elm evaluate --adapter FOLDER</code> makes them.</p>"
        )
    return f'<div class="elm-report">{"".join(parts)}</div>'


def make_page(
    chat: ErasureChat,
    concept: ChatConcept,
    folders: Mapping[str, str | Path],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Any:
    """The page, as a `gradio.Blocks`; raises `ImportError` without the extra `chat`.

    `folders` are those of the chat's adapters, in or beside which a report may lie. The controls begin with the settings of
    [`ErasureChat.answer`] that are given.
    """
    # Read when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    names = [*chat.adapters]

    def ask(
        text: str, adapter: str, temperature: float, most: float, seed: float, attack: str = PLAIN
    ) -> Iterator[Sequence[Any]]:
        text = text.strip()
        if not text:
            raise gr.Error("The question is empty: write one.", print_exception=False)
        terms = concept.terms(text)
        counted = ", ".join(terms[:6]) + (f" and {len(terms) - 6} more" if len(terms) > 6 else "")
        note = f'<div class="elm-note">{escape(attack)}; terms counted: {escape(counted or "none")}</div>'
        try:
            prompt = concept.prompt(text, attack, chat.processing_class)
            answers = chat.answer(
                prompt,
                terms,
                adapter=adapter,
                max_new_tokens=int(most),
                temperature=float(temperature),
                seed=int(seed),
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        for state in answers:
            yield prompt, note, *(answer_html(state[side]) for side in SIDES)

    with gr.Blocks(title=f"elm chat: {concept.name}", analytics_enabled=False) as page:
        gr.Markdown(f"## `elm chat`: {concept.name}\nBoth models read the same prompt. {DEFINITION}")
        with gr.Row():
            question = gr.Textbox(
                label="Question",
                value=concept.questions[0].text if concept.questions else "",
                elem_id="question",
                scale=4,
            )
            send = gr.Button("Ask", variant="primary", elem_id="ask", scale=1)
        with gr.Row():
            adapter = gr.Dropdown(names, value=names[0], label="Adapter", elem_id="adapter", scale=2)
            heat = gr.Slider(0, 2, value=temperature, step=0.1, label="Temperature (0: greedy)")
            most = gr.Slider(
                1, max(256, max_new_tokens), value=max_new_tokens, step=1, label="Longest answer, in tokens"
            )
            start = gr.Number(value=seed, precision=0, label="Seed of sampling")
        gr.Markdown("Attacks: ask the same question in another way")
        attacks = concept.attack_names(chat.processing_class)
        buttons = {}
        for family in dict.fromkeys(name.partition(".")[0] for name in attacks):
            with gr.Row():
                for name in (name for name in attacks if name.partition(".")[0] == family):
                    label = name.replace(".", ": ", 1)
                    buttons[name] = gr.Button(label, size="sm", min_width=90, elem_id=f"attack-{name}")
        note = gr.HTML(elem_id="note")
        with gr.Row(equal_height=True):
            answers = []
            for side in SIDES:
                with gr.Column():
                    gr.Markdown(f"### {side.capitalize()}")
                    answers.append(gr.HTML(elem_id=side))
        with gr.Accordion("The prompt as the models read it", open=False):
            prompt = gr.Textbox(show_label=False, interactive=False, lines=3, elem_id="prompt")
        with gr.Accordion("Report of the adapter", open=False, elem_id="report-box"):
            report = gr.HTML(report_html(folders[names[0]]), elem_id="report")
        given = [question, adapter, heat, most, start]
        shown = [prompt, note, *answers]
        # One at a time: the models are shared.
        for trigger, name in ((send.click, "ask"), (question.submit, "submit")):
            trigger(ask, given, shown, api_name=name, concurrency_id="models")
        for name, button in buttons.items():
            button.click(
                ask, [*given, gr.State(name)], shown, api_name=name.replace(".", "_"), concurrency_id="models"
            )
        adapter.change(lambda name: report_html(folders[name]), adapter, report, api_name="report")
    return page


def serve(page: Any, port: int | None = None) -> str:
    """Serve the page to this machine alone, in threads of its own, and say at which address.

    `page.block_thread()` waits, `page.close()` ends it. Raises `OSError` if the port is taken, by default the first free one from 7860.
    """
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    class Policy:
        """Adds the policy to every answer."""

        def __init__(self, app: Any):
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def told(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                await send(message)

            await self.app(scope, receive, told)

    # Of other names for this machine none is answered, so that no page of elsewhere can ask here.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(Policy)]
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=[],
            app_kwargs={"middleware": middleware},
            theme=gr.themes.Default(font=sans, font_mono=mono),
            css=_CSS,
        )
    except OSError as error:
        told = "every port from 7860 to 7959 is" if port is None else f"`port` is {port}, which is"
        raise OSError(f"{told} taken, or may not be used here: give another one.") from error
    return address
