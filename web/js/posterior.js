// Colours of this pack's links and slots. A colour palette that knows the types wins; one that does not would clear them.
import { app } from "../../../scripts/app.js";

const COLOURS = { LINEAR_OPERATOR: "#C0CA33", MEASUREMENT: "#00BFA5" };

// Palettes assign "" to every type they do not know, so that a plain value would last until the first palette is loaded.
function keep(table, type, colour) {
    let chosen = colour;
    Object.defineProperty(table, type, {
        get: () => chosen,
        set: (value) => { chosen = value || colour; },
        enumerable: true,
        configurable: true,
    });
}

app.registerExtension({
    name: "posterior.colours",
    setup() {
        for (const [type, colour] of Object.entries(COLOURS)) {
            keep(app.canvas.default_connection_color_byType, type, colour);
            keep(app.canvas.constructor.link_type_colors, type, colour);
        }
        // Nodes 2.0 take theirs from style sheets.
        const style = document.createElement("style");
        const rules = Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`);
        style.textContent = `:root { ${rules.join(" ")} }`;
        document.head.append(style);
    },
});
