// The page: each of its parts, set to work.

import { setUpCalibrations } from "./calibrations.js";
import { setUpDraw } from "./draw.js";
import { setUpJudge } from "./judge.js";
import { setUpKey } from "./key.js";
import { setUpModels } from "./models.js";
import { setUpService } from "./service.js";

setUpKey();
setUpModels();
setUpCalibrations();
setUpDraw();
setUpJudge();
setUpService();
