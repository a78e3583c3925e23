// The console's scripts: live updates, buttons that answer in the page, ages, keys. Pages work without them, too.
import { connect } from "./live.js";
import { answerForms } from "./forms.js";
import { handleKeys } from "./keys.js";
import { keepAges } from "./ages.js";
import { handleLogs } from "./logs.js";
import { copyTexts } from "./copy.js";
import { showTips } from "./tips.js";

document.documentElement.classList.add("scripts");
keepAges();
answerForms();
handleKeys();
showTips();
copyTexts();
if (document.querySelector("[data-log]")) handleLogs();
else if (document.body.dataset.version || document.getElementById("live-part")) connect();
