"""Who asks, and checks that need no repository."""

from .cards import find_errors, read_metadata
from .messages import Request, Response, answer_json
from .state import State


def whoami(state: State, request: Request) -> Response:
    user = state.signed_in(request)
    role = "write" if user.can_write else "read"
    return answer_json(
        {
            "type": "user",
            "id": user.name,
            "name": user.name,
            "fullname": user.name,
            "isPro": False,
            "orgs": [{"type": "org", "id": org, "name": org, "fullname": org} for org in user.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": role}},
        }
    )


def validate_yaml(state: State, request: Request) -> Response:
    readme = request.json().get("content", "")
    try:
        metadata = read_metadata(readme)
        errors = find_errors(metadata)
    except ValueError as error:
        metadata, errors = {}, [str(error)]
    warnings = [] if metadata or errors else ["empty or missing yaml metadata in repo card"]
    content = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return answer_json(content, 400 if errors else 200)


def agent_harnesses(state: State, request: Request) -> Response:
    return answer_json({"standardEnvVars": [], "harnesses": {}})
